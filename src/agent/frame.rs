//! What the daemon and the agent say to each other, byte by byte. Shared by both sides, so it knows
//! nothing but the standard library.
//!
//! A frame is one byte for its kind, four bytes for the length of what follows, most significant
//! first, and that many bytes. Nothing in it is trusted: lengths are bounded before room is made for
//! them, and what is left over or missing is an error.
//!
//! ```text
//! daemon → agent   Start, then any number of Stdin and one StdinEnd where Start announced them
//! agent → daemon   Hello, then Refused; or Started, any number of Stdout and Stderr, Exit
//! ```
//!
//! The daemon keeps its side open until it has heard Refused or Exit, whether it has anything to say
//! or not: to an agent, its end is the daemon's, and the function is killed. Then the daemon hangs up,
//! and only then the agent ends: a container's last words may get lost that ends with them.
//!
//! Stdin need not wait for Started. Started, Stdout and Stderr may be told a little late, to be told
//! together.

use std::fmt;

/// The version of this protocol. It changes with every change to a frame.
pub const VERSION: u8 = 1;
/// Bytes before a frame's payload.
pub const HEADER: usize = 5;
/// The most bytes of a stream in one frame.
pub const MAX_DATA: usize = 64 << 10;
/// The most bytes of a [`Start`]. A kernel takes no more than 2 MiB of arguments and environment.
pub const MAX_START: usize = 4 << 20;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Daemon: run this. A [`Start`].
    Start = 1,
    /// Daemon: bytes of standard input.
    Stdin = 2,
    /// Daemon: there is no more standard input.
    StdinEnd = 3,
    /// Agent: I am here. One byte, [`VERSION`].
    Hello = 16,
    /// Agent: the function has begun.
    Started = 17,
    /// Agent: the function could not be begun, and nothing of it ran. A [`Refusal`].
    Refused = 18,
    /// Agent: bytes of standard output.
    Stdout = 19,
    /// Agent: bytes of standard error.
    Stderr = 20,
    /// Agent: the function has ended, and nothing of it is left. An [`Exit`].
    Exit = 21,
}

impl Kind {
    const ALL: [Self; 9] = [
        Self::Start,
        Self::Stdin,
        Self::StdinEnd,
        Self::Hello,
        Self::Started,
        Self::Refused,
        Self::Stdout,
        Self::Stderr,
        Self::Exit,
    ];

    fn of(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == byte)
    }

    /// The most and the fewest bytes of its payload.
    fn bounds(self) -> (usize, usize) {
        match self {
            Self::Start => (0, MAX_START),
            Self::Stdin | Self::Stdout | Self::Stderr => (1, MAX_DATA),
            Self::StdinEnd | Self::Started => (0, 0),
            Self::Hello => (1, 1),
            Self::Refused => (Refusal::LENGTH, Refusal::LENGTH),
            Self::Exit => (Exit::LENGTH, Exit::LENGTH),
        }
    }
}

/// Bytes that are no frame, or not one that may come here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed(pub &'static str);

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Malformed {}

/// A frame's kind and the length of its payload.
///
/// # Errors
/// There is no such kind, or none of that length.
pub fn parse_header(header: [u8; HEADER]) -> Result<(Kind, usize), Malformed> {
    let [kind, a, b, c, d] = header;
    let kind = Kind::of(kind).ok_or(Malformed("a frame of no known kind"))?;
    let length = u32::from_be_bytes([a, b, c, d]) as usize;
    let (least, most) = kind.bounds();
    if length < least || length > most {
        return Err(Malformed("a frame of a length its kind cannot have"));
    }
    Ok((kind, length))
}

/// The header of a frame. `length` is within what the kind can have.
#[must_use]
pub fn header(kind: Kind, length: usize) -> [u8; HEADER] {
    #[expect(clippy::cast_possible_truncation, reason = "no kind can have 4 GiB")]
    let [a, b, c, d] = (length as u32).to_be_bytes();
    [kind as u8, a, b, c, d]
}

/// Appends a frame.
pub fn push(out: &mut Vec<u8>, kind: Kind, payload: &[u8]) {
    out.extend_from_slice(&header(kind, payload.len()));
    out.extend_from_slice(payload);
}

/// What to run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Start {
    /// The program and its arguments; not empty.
    pub argv: Vec<Vec<u8>>,
    /// `NAME=VALUE`, each in place of the container's own of that name, or beside it; a HOME is not
    /// empty, since an init process would look for another then.
    pub env: Vec<Vec<u8>>,
    /// Where to run it; absent: where the agent was started.
    pub dir: Option<Vec<u8>>,
    /// Whether it gets standard input from the daemon, and not from /dev/null.
    pub stdin: bool,
}

impl Start {
    /// As a frame's payload; nothing where that would be longer than [`MAX_START`].
    #[must_use]
    pub fn encode(&self) -> Option<Vec<u8>> {
        let dir: Vec<&[u8]> = self.dir.iter().map(Vec::as_slice).collect();
        let mut out = vec![u8::from(self.stdin)];
        for list in [refs(&self.argv), refs(&self.env), dir] {
            out.extend_from_slice(&u32::try_from(list.len()).ok()?.to_be_bytes());
            for item in list {
                out.extend_from_slice(&u32::try_from(item.len()).ok()?.to_be_bytes());
                out.extend_from_slice(item);
            }
        }
        (out.len() <= MAX_START).then_some(out)
    }

    /// From a frame's payload.
    ///
    /// # Errors
    /// It is no such payload, or names no program.
    pub fn decode(payload: &[u8]) -> Result<Self, Malformed> {
        let mut rest = Reader(payload);
        let stdin = match rest.take(1)? {
            [0] => false,
            [1] => true,
            _ => return Err(Malformed("a flag that is neither 0 nor 1")),
        };
        let (argv, env, mut dir) = (rest.list()?, rest.list()?, rest.list()?);
        if !rest.0.is_empty() || dir.len() > 1 {
            return Err(Malformed("more than a start holds"));
        }
        if argv.is_empty() {
            return Err(Malformed("a start of no program"));
        }
        Ok(Self { argv, env, dir: dir.pop(), stdin })
    }
}

fn refs(list: &[Vec<u8>]) -> Vec<&[u8]> {
    list.iter().map(Vec::as_slice).collect()
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(Malformed("cut short"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn number<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(Malformed("cut short"))?;
        self.0 = rest;
        Ok(*taken)
    }

    fn length(&mut self) -> Result<usize, Malformed> {
        Ok(u32::from_be_bytes(self.number()?) as usize)
    }

    fn list(&mut self) -> Result<Vec<Vec<u8>>, Malformed> {
        let length = self.length()?;
        // Each item takes four bytes at least: no room is made for what cannot be there.
        if length > self.0.len() / 4 {
            return Err(Malformed("cut short"));
        }
        let mut list = Vec::with_capacity(length);
        for _ in 0..length {
            let length = self.length()?;
            list.push(self.take(length)?.to_vec());
        }
        Ok(list)
    }
}

/// Why a function could not be begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What failed.
    pub step: Step,
    /// The kernel's error number; 0 where it was not the kernel that refused.
    pub errno: i32,
}

/// What an agent does before a function runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Changing to its working directory.
    Dir,
    /// Executing it.
    Exec,
    /// Anything else.
    Other,
}

impl Refusal {
    const LENGTH: usize = 5;

    /// As a frame's payload.
    #[must_use]
    pub fn encode(self) -> [u8; Self::LENGTH] {
        let step = match self.step {
            Step::Dir => 1,
            Step::Exec => 2,
            Step::Other => 3,
        };
        let [a, b, c, d] = self.errno.to_be_bytes();
        [step, a, b, c, d]
    }

    /// From a frame's payload.
    ///
    /// # Errors
    /// It is no such payload.
    pub fn decode(payload: &[u8]) -> Result<Self, Malformed> {
        let mut rest = Reader(payload);
        let step = match rest.number()? {
            [1] => Step::Dir,
            [2] => Step::Exec,
            [3] => Step::Other,
            _ => return Err(Malformed("a refusal of no known step")),
        };
        Ok(Self { step, errno: i32::from_be_bytes(rest.number()?) })
    }
}

/// How a function ended, and what it used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Its exit code, or 128 + n where signal n ended it.
    pub code: u8,
    /// How many processes of the container the kernel killed for want of memory; absent where the
    /// container cannot see that.
    pub oom_kills: Option<u32>,
    /// From its start to its exit, in microseconds.
    pub ran_us: u64,
    /// Processor time of all its processes, in microseconds.
    pub cpu_us: u64,
    /// The most memory that one of its processes held, in bytes.
    pub peak_bytes: u64,
}

impl Exit {
    const LENGTH: usize = 1 + 4 + 8 * 3;
    const UNKNOWN: u32 = u32::MAX;

    /// As a frame's payload.
    #[must_use]
    pub fn encode(self) -> Vec<u8> {
        let mut out = vec![self.code];
        out.extend_from_slice(&self.oom_kills.unwrap_or(Self::UNKNOWN).to_be_bytes());
        for number in [self.ran_us, self.cpu_us, self.peak_bytes] {
            out.extend_from_slice(&number.to_be_bytes());
        }
        out
    }

    /// From a frame's payload.
    ///
    /// # Errors
    /// It is no such payload.
    pub fn decode(payload: &[u8]) -> Result<Self, Malformed> {
        let mut rest = Reader(payload);
        let [code] = rest.number()?;
        let oom_kills = u32::from_be_bytes(rest.number()?);
        Ok(Self {
            code,
            oom_kills: (oom_kills != Self::UNKNOWN).then_some(oom_kills),
            ran_us: u64::from_be_bytes(rest.number()?),
            cpu_us: u64::from_be_bytes(rest.number()?),
            peak_bytes: u64::from_be_bytes(rest.number()?),
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let start = Start {
            argv: vec![b"sh".to_vec(), Vec::new(), vec![0xff; 300]],
            env: vec![b"A=b".to_vec()],
            dir: Some(b"/w".to_vec()),
            stdin: true,
        };
        assert_eq!(Start::decode(&start.encode().unwrap()), Ok(start.clone()));
        let bare = Start { argv: vec![b"a".to_vec()], ..Start::default() };
        assert_eq!(Start::decode(&bare.encode().unwrap()), Ok(bare));
        for oom_kills in [None, Some(0), Some(3)] {
            let exit = Exit { code: 137, oom_kills, ran_us: 1, cpu_us: u64::MAX, peak_bytes: 3 };
            assert_eq!(Exit::decode(&exit.encode()), Ok(exit));
        }
        for step in [Step::Dir, Step::Exec, Step::Other] {
            let refusal = Refusal { step, errno: 2 };
            assert_eq!(Refusal::decode(&refusal.encode()), Ok(refusal));
        }
        for kind in Kind::ALL {
            let (least, most) = kind.bounds();
            for length in [least, most] {
                assert_eq!(parse_header(header(kind, length)), Ok((kind, length)));
            }
            assert!(parse_header(header(kind, most + 1)).is_err(), "{kind:?}");
        }
    }

    #[test]
    fn what_is_cut_short_or_too_long_is_refused() {
        let start =
            Start { argv: vec![b"sh".to_vec()], dir: Some(b"/".to_vec()), ..Start::default() };
        let whole = start.encode().unwrap();
        for length in 0..whole.len() {
            assert!(Start::decode(&whole[..length]).is_err(), "{length}");
        }
        assert!(Start::decode(&[whole.as_slice(), b"x"].concat()).is_err());
        assert!(Start::decode(&[0, 0xff, 0xff, 0xff, 0xff]).is_err());
        let nothing = Start::default().encode().unwrap();
        assert_eq!(Start::decode(&nothing), Err(Malformed("a start of no program")));
        let huge = Start { argv: vec![vec![0; MAX_START]], ..Start::default() };
        assert_eq!(huge.encode(), None);
        assert!(parse_header([0; HEADER]).is_err());
    }
}
