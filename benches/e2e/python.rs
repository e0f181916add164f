//! A function that is an interpreter: how much of its time is its own.
//!
//! The image holds the machine's own Python: interpreter, libraries, standard library. What is compared is
//! `python3 -c 'print(1)'`, published and come back through the daemon, with the same start of the same interpreter in a
//! container that runs already, with the daemon's confinement. That one is timed from inside, by a program that starts
//! it with posix_spawn, reads what it prints and waits for it, one after the other: `docker exec` would charge it for the
//! engine, which is what a container that waits is there to avoid.

use std::path::{Path, PathBuf};
use std::process::{Command as Program, Stdio};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use crate::daemon::Function;
use crate::engine::{IMAGES, LABEL_BYSTANDER};
use crate::images;
use crate::stats::Samples;

pub(crate) static IMAGE: LazyLock<String> = LazyLock::new(|| format!("{}python:latest", *IMAGES));
/// Of the distribution: what a version manager puts before it in PATH may be a script.
const INTERPRETER: &str = "/usr/bin/python3";
/// What of the standard library no program needs.
const LEFT_OUT: [&str; 9] = [
    "test",
    "idlelib",
    "ensurepip",
    "tkinter",
    "lib2to3",
    "turtledemo",
    "distutils",
    "pydoc_data",
    "config-*",
];
/// Starts one interpreter after the other, as many as a line asks for, and says how long each took in microseconds.
const REFERENCE: &str = r#"
import os, sys, time
for line in sys.stdin:
    took = []
    for _ in range(int(line)):
        began = time.perf_counter_ns()
        reader, writer = os.pipe()
        actions = [(os.POSIX_SPAWN_DUP2, writer, 1), (os.POSIX_SPAWN_CLOSE, reader), (os.POSIX_SPAWN_CLOSE, writer)]
        pid = os.posix_spawn(sys.executable, ["python3", "-c", "print(1)"], os.environ, file_actions=actions)
        os.close(writer)
        printed = b""
        while chunk := os.read(reader, 4096):
            printed += chunk
        os.close(reader)
        _, status = os.waitpid(pid, 0)
        took.append((time.perf_counter_ns() - began) // 1000)
        assert status == 0 and printed == b"1\n", (status, printed)
    print(*took, flush=True)
"#;

pub(crate) fn function() -> Function {
    Function {
        image: Arc::from(IMAGE.as_str()),
        command: &["python3", "-c", "print(1)"],
        prints: "1\n",
        memory_bytes: None,
    }
}

/// Makes the image.
///
/// # Errors
/// Says what the machine lacks for it.
pub(crate) fn make_image() -> Result<()> {
    let interpreter = std::fs::canonicalize(INTERPRETER)
        .with_context(|| format!("{INTERPRETER} is missing (Debian: python3-minimal)"))?;
    let asked = Program::new(&interpreter)
        .args([
            "-I",
            "-c",
            "import os, sysconfig; print(sysconfig.get_path('stdlib')); print(os.__file__)",
        ])
        .output()?;
    let said = String::from_utf8(asked.stdout)?;
    let library = PathBuf::from(
        said.lines().next().context("the interpreter does not say where its library is")?,
    );
    ensure!(library.join("encodings").is_dir(), "{} is no standard library", library.display());
    let mut paths = vec![interpreter.clone(), library.clone(), PathBuf::from(INTERPRETER)];
    paths.extend(shared_libraries(&interpreter)?);
    // Extension modules bring libraries of their own; those that `print` loads are among the above.
    let mut tar = Program::new("tar")
        .args(["-C", "/", "--owner=0", "--group=0"])
        .args(LEFT_OUT.map(|name| format!("--exclude={}/{name}", relative(&library))))
        .args(["-cf", "-"])
        .args(paths.iter().map(|path| relative(path)))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut archive = tar.stdout.take().context("no stdout")?;
    images::import(&mut archive, &IMAGE, "/usr/bin:/bin")?;
    ensure!(tar.wait()?.success(), "tar failed");
    Ok(())
}

fn relative(path: &Path) -> String {
    path.display().to_string().trim_start_matches('/').to_owned()
}

/// The shared libraries a program is linked with, the dynamic linker, and the files that links among them stand for.
fn shared_libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let listed = Program::new("ldd").arg(program).output().context("ldd")?;
    let mut found = Vec::new();
    for word in String::from_utf8(listed.stdout)?.split_whitespace().filter(|w| w.starts_with('/'))
    {
        let mut path = PathBuf::from(word);
        // Where a directory is a link, as /lib is, the archive gets the file under the name it is looked for by.
        loop {
            found.push(path.clone());
            let Ok(target) = std::fs::read_link(&path) else { break };
            path = path.parent().context("a file in no directory")?.join(target);
        }
    }
    Ok(found)
}

/// A container that runs already, in which the interpreter is started over and over.
pub(crate) struct Reference {
    _client: Child,
    stdin: ChildStdin,
    stdout: Lines<BufReader<ChildStdout>>,
}

impl Reference {
    pub(crate) async fn start() -> Result<Self> {
        let mut client = Command::new("docker")
            .args(["run", "--rm", "-i", "--init", "--label", LABEL_BYSTANDER])
            // As the daemon confines a function.
            .args(["--network", "none", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"])
            .args(["--read-only", "--tmpfs", "/tmp", "--memory", "512m", "--memory-swap", "512m"])
            .args(["--cpus", "1", "--pids-limit", "256", "--log-driver", "none"])
            .args([IMAGE.as_str(), "python3", "-c", REFERENCE])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let stdin = client.stdin.take().context("no stdin")?;
        let stdout = BufReader::new(client.stdout.take().context("no stdout")?).lines();
        let mut reference = Self { _client: client, stdin, stdout };
        reference.run(3).await?;
        Ok(reference)
    }

    /// How long each of `count` starts took.
    pub(crate) async fn run(&mut self, count: usize) -> Result<Samples> {
        self.stdin.write_all(format!("{count}\n").as_bytes()).await?;
        let line = tokio::time::timeout(Duration::from_secs(60), self.stdout.next_line()).await??;
        let Some(line) = line else { bail!("the running container has ended") };
        let took: Result<Vec<f64>, _> = line.split(' ').map(str::parse).collect();
        Ok(Samples::from_values(took?.into_iter().map(|us| us / 1e3).collect()))
    }
}
