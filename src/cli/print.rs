//! What clients print: bytes as they are, tables, and times for people.

use std::io::{ErrorKind, Write};
use std::time::{Duration, SystemTime};

use bytes::Bytes;

use crate::capture::Stream;
use crate::job::printable;

/// The most of a value that a table shows, in bytes.
const MAX_CELL: usize = 120;

/// Nobody reads what is printed any more: an end, and no error.
#[derive(Debug, thiserror::Error)]
#[error("nobody reads standard output")]
pub(super) struct Closed;

/// Writes a function's output as it is. Whoever reads slowly is waited for, and nothing else waits
/// with them: the server would hang up on a client that takes nothing.
///
/// # Errors
/// It cannot be written; [`Closed`] where nobody reads on.
pub(super) async fn write(stream: Stream, bytes: Bytes) -> anyhow::Result<()> {
    let written = tokio::task::spawn_blocking(move || match stream {
        Stream::Stdout => all(&mut std::io::stdout().lock(), &bytes),
        Stream::Stderr => all(&mut std::io::stderr().lock(), &bytes),
    });
    checked(written.await.unwrap_or_else(|gone| Err(std::io::Error::other(gone))))
}

fn all(to: &mut impl Write, bytes: &[u8]) -> std::io::Result<()> {
    to.write_all(bytes)?;
    to.flush()
}

fn checked(written: std::io::Result<()>) -> anyhow::Result<()> {
    match written {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Err(Closed.into()),
        Err(error) => Err(anyhow::anyhow!("cannot print: {error}")),
    }
}

/// Prints text to standard output.
///
/// # Errors
/// It cannot be written; [`Closed`] where nobody reads on.
pub(super) fn stdout(text: &str) -> anyhow::Result<()> {
    checked(all(&mut std::io::stdout().lock(), text.as_bytes()))
}

/// Says something beside the output.
pub(super) fn note(text: impl std::fmt::Display) {
    // Much of it is others' words, which may hold what moves a terminal's cursor.
    let text = text.to_string().replace(|c: char| c.is_control() && c != '\n', "?");
    // Where nobody listens there is nobody to tell.
    let _ = writeln!(std::io::stderr(), "worker-spawner: {text}");
}

/// A table with its columns one below the other.
pub(super) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let head: Vec<String> = head.iter().map(|name| (*name).to_owned()).collect();
    let clean = |row: &Vec<String>| -> Vec<String> {
        row.iter().map(|cell| printable(cell, MAX_CELL)).collect()
    };
    let rows: Vec<Vec<String>> = std::iter::once(&head).chain(rows).map(clean).collect();
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or_default()
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        format!("{}\n", cells.collect::<Vec<_>>().join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

/// How long ago that was.
pub(super) fn age(since: Option<SystemTime>) -> String {
    match since {
        Some(since) => short(since.elapsed().unwrap_or_default()),
        None => "-".to_owned(),
    }
}

/// A duration in its largest unit, as tables have it.
pub(super) fn short(duration: Duration) -> String {
    match duration.as_secs() {
        seconds @ 0..120 => format!("{seconds}s"),
        seconds @ 120..7200 => format!("{}m", seconds / 60),
        seconds @ 7200..172_800 => format!("{}h", seconds / 3600),
        seconds => format!("{}d", seconds / 86400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_line_up_and_show_no_control_characters() {
        let rows = [
            vec!["1".to_owned(), "running".to_owned()],
            vec!["a-long-one".to_owned(), "\u{1b}[31mred".to_owned()],
        ];
        let wanted = "ID          STATE\n1           running\na-long-one  ?[31mred\n";
        assert_eq!(table(&["ID", "STATE"], &rows), wanted);
        assert_eq!(table(&["ID"], &[]), "ID\n");
    }

    #[test]
    fn durations_are_short() {
        for (seconds, wanted) in
            [(0, "0s"), (119, "119s"), (120, "2m"), (7200, "2h"), (172_800, "2d")]
        {
            assert_eq!(short(Duration::from_secs(seconds)), wanted);
        }
        assert_eq!(age(None), "-");
        assert_eq!(age(Some(SystemTime::now() + Duration::from_secs(9))), "0s", "clocks differ");
    }
}
