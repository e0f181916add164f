//! The line to an agent: frames there and back over the streams the engine attaches.

use std::pin::Pin;

use bollard::container::{AttachContainerResults, LogOutput};
use bollard::errors::Error;
use futures::StreamExt;
use futures::future::FutureExt;
use futures::stream::BoxStream;
use tokio::io::{AsyncWrite, AsyncWriteExt};

use crate::agent::dialogue::{Dialogue, Said, Violation};

/// The half of a line that speaks.
pub(super) type Voice = Pin<Box<dyn AsyncWrite + Send>>;

/// The half of a line that listens. Dropped, it ends the engine's interest, not the agent's.
pub(super) struct Ear {
    output: BoxStream<'static, Result<LogOutput, Error>>,
    dialogue: Dialogue,
}

/// Why nothing more comes of a line.
#[derive(Debug, thiserror::Error)]
pub(super) enum Lost {
    /// The container has ended, or the engine.
    #[error("the line to the container has ended")]
    Ended,
    /// What came is not what an agent says.
    #[error("the container does not speak as an agent does: {0}")]
    Violated(#[from] Violation),
}

/// The two halves of the line to a container.
pub(super) fn open(attached: AttachContainerResults) -> (Ear, Voice) {
    (Ear { output: attached.output, dialogue: Dialogue::default() }, attached.input)
}

impl Ear {
    /// What the agent says next. Cancel-safe.
    pub(super) async fn next(&mut self) -> Result<Said, Lost> {
        loop {
            if let Some(said) = self.dialogue.pull()? {
                return Ok(said);
            }
            match self.output.next().await {
                Some(Ok(LogOutput::StdOut { message })) => self.dialogue.push(message),
                // What an agent has to complain of, or what is left of a breaking connection.
                Some(Ok(other)) => tracing::debug!(said = ?other, "an agent complains"),
                Some(Err(_)) | None => return Err(Lost::Ended),
            }
        }
    }

    /// Whether the agent still waits, as it should: silently.
    pub(super) fn is_silent(&mut self) -> bool {
        self.next().now_or_never().is_none()
    }
}

/// Writes all of it.
pub(super) async fn say(voice: &mut Voice, frames: &[u8]) -> Result<(), Lost> {
    let said = async {
        voice.write_all(frames).await?;
        voice.flush().await
    };
    said.await.map_err(|_: std::io::Error| Lost::Ended)
}
