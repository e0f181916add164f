//! `top` on a terminal: what it draws, how it ends, and that it leaves the terminal as it was.

use std::io::{Read as _, Write as _};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::support::process::{self, bound_to_this_thread, exit_of};
use crate::support::screen;
use crate::support::wait::{PATIENCE, eventually};
use crate::support::world::World;

/// The other screen of a terminal, taken and given back.
const ENTERS: &str = "\u{1b}[?1049h";
const LEAVES: &str = "\u{1b}[?1049l";

/// The program with these arguments, for the server of `world`.
fn command(world: &World, program: &str, arguments: &[&str]) -> Command {
    let mut command = bound_to_this_thread(program);
    command.args(arguments).env_clear().envs(world.nats.settings());
    for name in ["PATH", "LLVM_PROFILE_FILE"] {
        command.envs(std::env::var(name).map(|value| (name, value)));
    }
    command.env("HOME", "/").env("TERM", "xterm").env("SHELL", "/bin/sh");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A terminal of 80 columns and 24 lines with `top` on it.
struct Terminal {
    child: Child,
    printed: Arc<Mutex<Vec<u8>>>,
}

impl Terminal {
    /// `wrapper` is what starts it, `beside` what happens meanwhile.
    fn new(world: &World, beside: &str, wrapper: &str) -> Self {
        let program = env!("CARGO_BIN_EXE_worker-spawner");
        let line = format!(
            "stty rows 24 cols 80; before=$(stty -g); {beside} {wrapper} {program} top --interval 200ms; \
             code=$?; after=$(stty -g); test \"$before\" = \"$after\" && echo as it was, $code"
        );
        let mut child =
            command(world, "script", &["-qefc", &line, "/dev/null"]).spawn().expect("script");
        let printed = Arc::new(Mutex::new(Vec::new()));
        let (kept, mut stdout) = (printed.clone(), child.stdout.take().unwrap());
        std::thread::spawn(move || {
            let mut part = [0; 4096];
            while let Ok(length @ 1..) = stdout.read(&mut part) {
                kept.lock().unwrap().extend_from_slice(&part[..length]);
            }
        });
        Self { child, printed }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.printed.lock().unwrap()).into_owned()
    }

    /// What is on the screen now.
    fn screen(&self) -> String {
        let text = self.text();
        let Some((_, drawn)) = text.split_once(ENTERS) else { return String::new() };
        screen::lines(drawn, 100, 30).join("\n")
    }

    /// Waits until this is on the screen.
    async fn shows(&self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.screen().contains(text) {
            assert!(Instant::now() < deadline, "{text:?} is not drawn:\n{}", self.screen());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn types(&mut self, keys: &[u8]) {
        let stdin = self.child.stdin.as_mut().unwrap();
        stdin.write_all(keys).and_then(|()| stdin.flush()).unwrap();
    }

    /// Waits for the end, which must leave the terminal as it was.
    async fn ends_with(mut self, code: i32) {
        assert!(exit_of(&mut self.child, PATIENCE).await.is_some(), "{}", self.screen());
        let wanted = format!("as it was, {code}\r\n");
        eventually("all is read", || async { self.text().contains("as it was") }).await;
        let text = self.text();
        let (_, drawn) = text.split_once(ENTERS).expect("it draws on the other screen");
        let (drawn, after) = drawn.rsplit_once(LEAVES).expect("it goes back to the first screen");
        assert!(after.ends_with(&wanted), "{after:?}");
        assert!(drawn.ends_with("\u{1b}[?25h"), "the cursor is seen again");
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        process::end(&mut self.child);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn running_jobs_are_drawn_and_q_quits() {
    for world in [World::start(&[]).await, World::durable(&[]).await] {
        let early = world.hold().await;
        let mut terminal = Terminal::new(&world, "", "");
        terminal.shows("worker-spawner top").await;
        terminal.shows("1 of 5").await;
        if world.settings.get("DELIVERY") == Some("jetstream") {
            // Its record is read: nothing else is told of it.
            terminal.shows(&early.id).await;
            terminal.shows("0 waiting").await;
        }
        let late = world.hold().await;
        terminal.shows(&late.id).await;
        terminal.shows("2 of 5").await;
        world.release(&early).await;
        world.release(&late).await;
        terminal.shows("succeeded").await;
        terminal.shows("0 of 5").await;
        terminal.types(b"q");
        terminal.ends_with(0).await;
        world.clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn every_end_leaves_the_terminal_as_it_was() {
    let mut world = World::start(&[]).await;
    let mut terminal = Terminal::new(&world, "", "");
    terminal.shows("workers 1").await;
    terminal.types(b"\x03");
    terminal.ends_with(0).await;
    let terminal =
        Terminal::new(&world, "", "timeout --foreground --preserve-status --signal TERM 3");
    terminal.ends_with(143).await;
    let wider = "(sleep 2; stty -F /dev/tty rows 30 cols 100) &";
    let mut terminal = Terminal::new(&world, wider, "");
    // The first line ends at another column.
    terminal.shows(&format!("{:30}q quits\n", "")).await;
    world.nats.stop();
    terminal.shows("connection to NATS is lost").await;
    terminal.types(b"q");
    terminal.ends_with(0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn without_a_terminal_it_says_what_to_do_instead() {
    let world = World::durable(&[]).await;
    let program = env!("CARGO_BIN_EXE_worker-spawner");
    let refused = command(&world, program, &["top"]).output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains("`top --once`") && said.contains("`ps`"), "{said}");
    let held = world.hold().await;
    let once = command(&world, program, &["top", "--once"]).output().unwrap();
    let text = String::from_utf8_lossy(&once.stdout).into_owned();
    assert!(text.starts_with("slots  1 of 5 in use\nqueue  0 waiting, 1 with workers\n"), "{text}");
    let job = text.lines().find(|line| line.starts_with(&held.id)).expect("the job is listed");
    assert!(job.contains("  running  "), "{text}");
    assert!(!text.contains('\u{1b}'), "{text}");
    world.release(&held).await;
    world.clean().await;
}
