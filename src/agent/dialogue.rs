//! What an agent says, taken apart and held to the order in which it may say it.
//!
//! The agent shares a container with a function that is nobody's friend. Whatever comes out of there
//! may be forged, so every byte is checked and nothing is kept beyond one frame. Pure: it is given
//! bytes and gives events, and knows neither engine nor clock.

use bytes::{Buf as _, Bytes, BytesMut};
use thiserror::Error;

use super::frame::{self, Exit, HEADER, Kind, Malformed, Refusal};

/// What an agent said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    /// It waits for a start. The first there is.
    Ready,
    /// The function has begun.
    Started,
    /// The function could not be begun. The last there is.
    Refused(Refusal),
    /// Some of its standard output; not empty.
    Stdout(Bytes),
    /// Some of its standard error; not empty.
    Stderr(Bytes),
    /// The function has ended. The last there is.
    Exited(Exit),
}

/// Something that no agent of this daemon's says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Violation {
    /// It is no frame.
    #[error("the agent sent {0}")]
    Malformed(#[from] Malformed),
    /// Another version of the protocol than [`frame::VERSION`].
    #[error("the agent speaks version {0} of the protocol")]
    Version(u8),
    /// A frame that may not come here.
    #[error("the agent sent a frame of kind {0:?} out of turn")]
    OutOfTurn(Kind),
}

/// How far a dialogue has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Silent,
    Ready,
    Running,
    Over,
    Broken(Violation),
}

/// One agent's side of the conversation, from its hello to the function's end.
///
/// [`push`](Self::push) takes what came, [`pull`](Self::pull) gives what it says, until there is
/// nothing more in it. Held to that, it keeps one chunk and one incomplete frame at most, whatever
/// the other side sends.
#[derive(Debug)]
pub struct Dialogue {
    phase: Phase,
    /// What was pushed and not yet looked at. Frames that lie in it whole are not copied.
    chunk: Bytes,
    /// The beginning of a frame whose end has not come yet; its header, once whole, was accepted.
    partial: BytesMut,
}

impl Default for Dialogue {
    fn default() -> Self {
        Self::new()
    }
}

impl Dialogue {
    /// A dialogue in which nothing was said yet.
    #[must_use]
    pub fn new() -> Self {
        Self { phase: Phase::Silent, chunk: Bytes::new(), partial: BytesMut::new() }
    }

    /// Takes the next bytes that came out of the container, cut anywhere.
    pub fn push(&mut self, chunk: Bytes) {
        if self.chunk.is_empty() {
            self.chunk = chunk;
        } else {
            self.chunk = [&self.chunk[..], &chunk[..]].concat().into();
        }
    }

    /// What was said next; nothing where its end has not come yet.
    ///
    /// # Errors
    /// What came is nothing that an agent says here. Nothing follows: the same error comes again.
    pub fn pull(&mut self) -> Result<Option<Said>, Violation> {
        if let Phase::Broken(violation) = self.phase {
            return Err(violation);
        }
        let said = self.frame().and_then(|frame| match frame {
            Some((kind, payload)) => self.interpret(kind, payload).map(Some),
            None => Ok(None),
        });
        if let Err(violation) = said {
            *self = Self { phase: Phase::Broken(violation), ..Self::new() };
        }
        said
    }

    /// How many bytes it keeps. Below a header and [`frame::MAX_DATA`] when there is nothing to pull.
    #[must_use]
    pub fn held(&self) -> usize {
        self.chunk.len() + self.partial.len()
    }

    /// The next frame, once it is whole.
    fn frame(&mut self) -> Result<Option<(Kind, Bytes)>, Violation> {
        if self.partial.is_empty()
            && let Some(header) = self.chunk.first_chunk()
        {
            let (kind, length) = self.admit(*header)?;
            if self.chunk.len() >= HEADER + length {
                let mut frame = self.chunk.split_to(HEADER + length);
                frame.advance(HEADER);
                return Ok(Some((kind, frame)));
            }
        }
        self.gather(HEADER);
        let Some(header) = self.partial.first_chunk() else {
            return Ok(None);
        };
        let (kind, length) = self.admit(*header)?;
        self.gather(HEADER + length);
        if self.partial.len() < HEADER + length {
            return Ok(None);
        }
        let mut frame = std::mem::take(&mut self.partial).freeze();
        frame.advance(HEADER);
        Ok(Some((kind, frame)))
    }

    /// Moves bytes from the chunk until the partial frame has `length`, or there are no more.
    fn gather(&mut self, length: usize) {
        let missing = length.saturating_sub(self.partial.len()).min(self.chunk.len());
        self.partial.extend_from_slice(&self.chunk.split_to(missing));
    }

    /// Whether a frame that begins like this may come now. Asked before there is room for the rest.
    fn admit(&self, header: [u8; HEADER]) -> Result<(Kind, usize), Violation> {
        let (kind, length) = frame::parse_header(header)?;
        let in_turn = match self.phase {
            Phase::Silent => matches!(kind, Kind::Hello),
            Phase::Ready => matches!(kind, Kind::Started | Kind::Refused),
            Phase::Running => matches!(kind, Kind::Stdout | Kind::Stderr | Kind::Exit),
            Phase::Over | Phase::Broken(_) => false,
        };
        if in_turn { Ok((kind, length)) } else { Err(Violation::OutOfTurn(kind)) }
    }

    fn interpret(&mut self, kind: Kind, payload: Bytes) -> Result<Said, Violation> {
        let (phase, said) = match kind {
            Kind::Hello => match payload.first() {
                Some(&frame::VERSION) => (Phase::Ready, Said::Ready),
                version => return Err(Violation::Version(version.copied().unwrap_or(0))),
            },
            Kind::Started => (Phase::Running, Said::Started),
            Kind::Refused => (Phase::Over, Said::Refused(Refusal::decode(&payload)?)),
            Kind::Stdout => (Phase::Running, Said::Stdout(payload)),
            Kind::Stderr => (Phase::Running, Said::Stderr(payload)),
            Kind::Exit => (Phase::Over, Said::Exited(Exit::decode(&payload)?)),
            Kind::Start | Kind::Stdin | Kind::StdinEnd => return Err(Violation::OutOfTurn(kind)),
        };
        self.phase = phase;
        Ok(said)
    }
}

#[cfg(test)]
#[path = "dialogue_tests.rs"]
mod tests;
