//! The C library's functions that the standard library has no face for, and nothing else: all of the
//! agent's unsafe code is here.
//!
//! The declarations hold for x86-64 and AArch64 Linux with glibc and musl, which agree in all of them.

use std::ffi::{CStr, CString, c_char, c_int, c_long, c_ulong, c_void};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::time::Duration;

#[cfg(not(all(
    target_os = "linux",
    any(target_env = "gnu", target_env = "musl"),
    any(target_arch = "x86_64", target_arch = "aarch64")
)))]
compile_error!("the agent's system calls are declared for x86-64 and AArch64 Linux alone");

pub const SIGKILL: c_int = 9;
pub const SIGCHLD: c_int = 17;
/// The last of the real-time signals.
const SIGNALS: c_int = 64;
/// What a program does to itself by a fault, as opposed to what it is told. Left unblocked: sent by
/// somebody else, the kernel keeps these from the first process of a container, as it does from tini.
const FAULTS: [c_int; 7] = [4, 5, 6, 7, 8, 11, 31];

pub const ENOENT: i32 = 2;
const ENOEXEC: i32 = 8;
const EACCES: i32 = 13;
const ENODEV: i32 = 19;
const ENOTDIR: i32 = 20;
const ENAMETOOLONG: i32 = 36;
const ETIMEDOUT: i32 = 110;
const ESTALE: i32 = 116;

pub const POLLIN: i16 = 0x1;
pub const POLLOUT: i16 = 0x4;
pub const POLLERR: i16 = 0x8;
pub const POLLHUP: i16 = 0x10;

const PR_SET_DUMPABLE: c_int = 4;
#[cfg(target_arch = "x86_64")]
const SYS_RT_SIGACTION: c_long = 13;
#[cfg(target_arch = "aarch64")]
const SYS_RT_SIGACTION: c_long = 134;
const SYS_CLOSE_RANGE: c_long = 436;
const CLOSE_RANGE_CLOEXEC: c_ulong = 4;
const F_GETFL: c_int = 3;
const F_SETFL: c_int = 4;
const O_NONBLOCK: c_int = 0o4000;
const O_CLOEXEC: c_int = 0o2_000_000;
const SIG_SETMASK: c_int = 2;
const WNOHANG: c_int = 1;
const RUSAGE_CHILDREN: c_int = -1;
const CLONE_VM: c_int = 0x100;
const CLONE_VFORK: c_int = 0x4000;

/// As `struct pollfd`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Poll {
    fd: RawFd,
    events: i16,
    happened: i16,
}

/// As `sigset_t`.
#[repr(C)]
struct SignalSet([c_ulong; 16]);

/// As `struct signalfd_siginfo`.
#[repr(C)]
struct SignalInfo {
    number: u32,
    errno: i32,
    code: i32,
    pid: u32,
    rest: [u64; 14],
}

/// As `struct rusage` of musl, which is glibc's with room at its end.
#[repr(C)]
struct Rusage {
    user: [c_long; 2],
    system: [c_long; 2],
    max_rss_kib: c_long,
    rest: [c_long; 13 + 16],
}

unsafe extern "C" {
    fn clone(
        child: extern "C" fn(*mut c_void) -> c_int,
        stack: *mut c_void,
        flags: c_int,
        argument: *mut c_void,
        ...
    ) -> c_int;
    fn dup2(old: RawFd, new: RawFd) -> RawFd;
    fn execve(path: *const c_char, argv: *const *const c_char, env: *const *const c_char) -> c_int;
    fn fcntl(fd: RawFd, command: c_int, ...) -> c_int;
    fn getrusage(who: c_int, usage: *mut Rusage) -> c_int;
    #[link_name = "kill"]
    safe fn c_kill(pid: c_int, signal: c_int) -> c_int;
    #[link_name = "poll"]
    fn c_poll(fds: *mut Poll, count: c_ulong, timeout: c_int) -> c_int;
    fn prctl(option: c_int, ...) -> c_int;
    safe fn setpgid(pid: c_int, group: c_int) -> c_int;
    safe fn sigaddset(set: &mut SignalSet, signal: c_int) -> c_int;
    safe fn signalfd(fd: RawFd, set: &SignalSet, flags: c_int) -> RawFd;
    fn sigprocmask(how: c_int, set: *const SignalSet, old: *mut SignalSet) -> c_int;
    fn syscall(number: c_long, ...) -> c_long;
    fn waitpid(pid: c_int, status: *mut c_int, options: c_int) -> c_int;
}

fn check(returned: c_int) -> io::Result<c_int> {
    if returned < 0 { Err(io::Error::last_os_error()) } else { Ok(returned) }
}

/// Closes this process' memory and descriptors to the others in its container: none of them may trace
/// it, nor open what is below its `/proc/1/fd` or its `/proc/1/mem`, whatever user they are.
pub fn forbid_inspection() -> io::Result<()> {
    let no: c_ulong = 0;
    // SAFETY: this option takes one number and touches no memory.
    check(unsafe { prctl(PR_SET_DUMPABLE, no, no, no, no) }).map(|_| ())
}

/// Keeps every descriptor but the standard streams from the function, whoever left it open: that an
/// engine leaks one has happened.
pub fn inherit_nothing() {
    // SAFETY: this system call takes three numbers and touches no memory. It closes nothing. Kernels
    // before 5.11 do not know it and leave things as they are.
    unsafe { syscall(SYS_CLOSE_RANGE, 3 as c_ulong, c_ulong::from(u32::MAX), CLOSE_RANGE_CLOEXEC) };
}

/// Has reads and writes fail rather than wait.
pub fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the descriptor is open, and these commands touch no memory.
    let flags = check(unsafe { fcntl(fd.as_raw_fd(), F_GETFL) })?;
    // SAFETY: as above.
    check(unsafe { fcntl(fd.as_raw_fd(), F_SETFL, flags | O_NONBLOCK) }).map(|_| ())
}

impl Poll {
    /// Waits for `events`; with none, for a hang-up or an error alone.
    pub fn on(fd: &impl AsFd, events: i16) -> Self {
        Self { fd: fd.as_fd().as_raw_fd(), events, happened: 0 }
    }

    /// Waits for nothing.
    pub const NEVER: Self = Self { fd: -1, events: 0, happened: 0 };

    pub fn has(self, events: i16) -> bool {
        self.happened & events != 0
    }
}

/// Waits until one of `polls` has something or the time is up.
pub fn poll(polls: &mut [Poll], timeout: Option<Duration>) -> io::Result<()> {
    // Rounded up: a wait of less than a millisecond must not become a loop.
    let timeout = timeout
        .map_or(-1, |time| c_int::try_from(time.as_micros().div_ceil(1000)).unwrap_or(c_int::MAX));
    // SAFETY: the pointer and the length are those of one slice. A descriptor that was closed is
    // reported, no more.
    match check(unsafe { c_poll(polls.as_mut_ptr(), polls.len() as c_ulong, timeout) }) {
        // Then nothing has happened to any of them.
        Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
        _ => Ok(()),
    }
}

/// A signal that was sent to this process.
pub struct Signal {
    pub number: c_int,
    /// The sender's number in this container; 0 for one outside.
    pub sender: u32,
}

/// The signals sent to this process, which it reads instead of being interrupted by them.
pub struct Signals(File);

impl Signals {
    /// Gives every signal its default disposition and blocks it. Children have the former from here
    /// and take back the latter themselves.
    pub fn take() -> io::Result<Self> {
        // The kernel's own structure, of which the default is all zeros. The C library's face refuses
        // the signals that it keeps for itself, and those, too, may have come here ignored.
        let default = [0_u64; 4];
        let length = size_of::<u64>();
        let mut set = SignalSet([0; 16]);
        for number in 1..=SIGNALS {
            let (new, old) = (default.as_ptr(), ptr::null_mut::<u64>());
            // SAFETY: the new disposition is as long as the kernel's structure and runs no code of this
            // program's; the old one is not asked for. It fails for those that cannot be changed.
            unsafe { syscall(SYS_RT_SIGACTION, c_long::from(number), new, old, length) };
            if !FAULTS.contains(&number) {
                sigaddset(&mut set, number);
            }
        }
        // SAFETY: the set is valid, and the old one is not asked for.
        check(unsafe { sigprocmask(SIG_SETMASK, &set, ptr::null_mut()) })?;
        let fd = check(signalfd(-1, &set, O_CLOEXEC | O_NONBLOCK))?;
        // SAFETY: the call has just made this descriptor, for nobody else.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }.into()))
    }

    /// The next one, where there is one.
    pub fn next(&self) -> io::Result<Option<Signal>> {
        let mut bytes = [0; size_of::<SignalInfo>()];
        match (&self.0).read(&mut bytes) {
            Ok(length) if length == bytes.len() => {
                // SAFETY: any bytes are a valid value of this type, which has numbers alone.
                let info: SignalInfo = unsafe { ptr::read_unaligned(bytes.as_ptr().cast()) };
                Ok(Some(Signal { number: info.number as c_int, sender: info.pid }))
            }
            Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Sends a signal to a process.
pub fn kill(pid: i32, signal: c_int) {
    // It fails where the process is gone, which is what was to be achieved or comes too late.
    c_kill(pid, signal);
}

/// Kills every other process of the container that this one may. To be called by its first process
/// alone: for any other, it is every process of the user.
pub fn kill_all_others() {
    kill(-1, SIGKILL);
}

/// What became of the children.
pub enum Reaped {
    /// This one has ended, with its exit code as shells count it.
    Child(i32, u8),
    /// There are some, and none of them has ended.
    NoneYet,
    /// There are none.
    NoneLeft,
}

/// Takes leave of one child that has ended, if there is one.
pub fn reap() -> Reaped {
    let mut status = 0;
    // SAFETY: the pointer is that of a variable of ours.
    match unsafe { waitpid(-1, &raw mut status, WNOHANG) } {
        0 => Reaped::NoneYet,
        // ECHILD; with these arguments there is no other error.
        ..0 => Reaped::NoneLeft,
        pid => {
            let code = match status & 0x7f {
                0 => status >> 8,
                signal => 128 + signal,
            };
            // Of either, eight bits are the exit code.
            Reaped::Child(pid, code as u8)
        }
    }
}

/// Processor time in microseconds of all children that were reaped, and the most memory in bytes that
/// one of them held.
pub fn usage_of_children() -> (u64, u64) {
    let mut usage = Rusage { user: [0; 2], system: [0; 2], max_rss_kib: 0, rest: [0; 13 + 16] };
    // SAFETY: the structure is as long as either library's. Where the call fails, zeros remain.
    unsafe { getrusage(RUSAGE_CHILDREN, &raw mut usage) };
    let us = |[seconds, us]: [c_long; 2]| seconds.unsigned_abs() * 1_000_000 + us.unsigned_abs();
    (us(usage.user) + us(usage.system), usage.max_rss_kib.unsigned_abs() * 1024)
}

/// A program to be executed.
pub struct Program<'a> {
    /// Where it may be, in the order in which to look.
    pub candidates: &'a [CString],
    pub argv: &'a [CString],
    pub env: &'a [CString],
    /// Standard input, output and error.
    pub stdio: [BorrowedFd<'a>; 3],
}

/// Why there is no child.
pub enum SpawnError {
    /// The program could not be executed.
    Exec(i32),
    /// It did not come to that.
    Clone(io::Error),
}

/// What a child needs to become the program: all that takes memory is made beforehand.
struct Child<'a> {
    program: &'a Program<'a>,
    argv: Vec<*const c_char>,
    /// The arguments of the shell, for a script that names no interpreter. Its own place, the second,
    /// is filled in when it is known.
    script: Vec<*const c_char>,
    env: Vec<*const c_char>,
    /// Why it could not be executed; 0 where it was.
    errno: i32,
}

/// Room for what [`become_program`] calls: system calls, and little between them.
const CHILD_STACK: usize = 32 << 10;

/// Executes the program in a process group of its own, and returns its process' number once it runs.
///
/// The child borrows this process' memory until it executes the program: a fork would copy the tables
/// of its pages for that, on a request's way. The C library's `posix_spawn` does the same, but has the
/// program ignore the signals that the library keeps for itself.
pub fn spawn(program: &Program<'_>) -> Result<i32, SpawnError> {
    const SHELL: &CStr = c"/bin/sh";
    let argv = pointers(program.argv.iter());
    let mut script = vec![SHELL.as_ptr(), ptr::null()];
    script.extend(argv.iter().skip(1));
    let env = pointers(program.env.iter());
    let mut child = Child { program, argv, script, env, errno: 0 };
    let mut stack = vec![0_u128; CHILD_STACK / size_of::<u128>()];
    let top = stack.as_mut_ptr_range().end.cast();
    let flags = CLONE_VM | CLONE_VFORK | SIGCHLD;
    // SAFETY: the child runs on a stack of its own, aligned as it is to be, and is given what only it
    // touches: this process, which has one thread, stands still until the child has executed the
    // program or ended. No handler can run in between, for no signal has one.
    let pid = check(unsafe { clone(become_program, top, flags, (&raw mut child).cast()) });
    let pid = pid.map_err(SpawnError::Clone)?;
    if child.errno == 0 { Ok(pid) } else { Err(SpawnError::Exec(child.errno)) }
}

/// A child's life. What it returns is its exit code.
extern "C" fn become_program(child: *mut c_void) -> c_int {
    // SAFETY: what `spawn` passes, and waits for.
    let child = unsafe { &mut *child.cast::<Child<'_>>() };
    // It cannot fail in a new child that is no leader of a session.
    setpgid(0, 0);
    for (fd, place) in child.program.stdio.iter().zip(0..) {
        // SAFETY: the places are those of the parent's own standard streams, of which this process has
        // a copy that it has no use for.
        unsafe { dup2(fd.as_raw_fd(), place) };
    }
    let none = SignalSet([0; 16]);
    // SAFETY: the set is valid, and the old one is not asked for.
    unsafe { sigprocmask(SIG_SETMASK, &none, ptr::null_mut()) };
    child.errno = execute(child.program.candidates, &child.argv, &mut child.script, &child.env);
    127
}

/// Does as glibc's `execvp`, which is what tini calls; musl's knows no scripts without an interpreter.
/// Returns the error number if it returns.
fn execute(
    candidates: &[CString],
    argv: &[*const c_char],
    script: &mut [*const c_char],
    env: &[*const c_char],
) -> i32 {
    let (mut errno, mut denied) = (ENOENT, false);
    for path in candidates {
        // SAFETY: all three are strings that end, and lists of them that end with a null.
        errno = unsafe { exec(path.as_ptr(), argv, env) };
        if errno == ENOEXEC {
            script[1] = path.as_ptr();
            // SAFETY: as above; the first of the list is the shell's path.
            errno = unsafe { exec(script[0], script, env) };
        }
        match errno {
            EACCES => denied = true,
            // Not here, perhaps elsewhere.
            ENOENT | ENODEV | ENOTDIR | ENAMETOOLONG | ETIMEDOUT | ESTALE => {}
            _ => return errno,
        }
    }
    if denied { EACCES } else { errno }
}

/// # Safety
/// `path` is a string that ends; `argv` and `env` are lists of such, ended by a null.
unsafe fn exec(path: *const c_char, argv: &[*const c_char], env: &[*const c_char]) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { execve(path, argv.as_ptr(), env.as_ptr()) };
    io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// A list of pointers, ended by a null, that is valid as long as the strings are.
fn pointers<'a>(strings: impl Iterator<Item = &'a CString>) -> Vec<*const c_char> {
    strings.map(|s| s.as_ptr()).chain([ptr::null()]).collect()
}
