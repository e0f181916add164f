//! Requests as they are read: a JSON object a line, or one JSON document.

use std::io::Cursor;
use std::path::Path;

use anyhow::Context as _;
use serde_json::{Map, Value};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};
use tokio::sync::mpsc;

use crate::cli::input;

/// The most bytes of a line, and of a document.
const MAX_LINE: u64 = 64 << 20;

/// A request, or why it is none.
#[derive(Debug, PartialEq)]
pub(super) struct Item {
    /// Where it stands: a line's number, or its place in a list.
    pub(super) place: String,
    pub(super) request: Result<Map<String, Value>, String>,
}

/// Opens a file; `-` is standard input.
///
/// # Errors
/// It cannot be read.
pub(super) async fn open(file: &str) -> anyhow::Result<tokio::fs::File> {
    if file == "-" {
        return input::standard();
    }
    tokio::fs::File::open(file).await.with_context(|| file.to_owned())
}

/// How many requests a file has, where that can be known without reading what is read only once.
pub(super) fn count(file: &str) -> Option<u64> {
    use std::io::BufRead;
    let path = Path::new(file);
    if file == "-" || !path.is_file() {
        return None;
    }
    let mut lines = std::io::BufReader::new(std::fs::File::open(path).ok()?).split(b'\n');
    lines.try_fold(0, |count, line| Some(count + u64::from(!line.ok()?.trim_ascii().is_empty())))
}

/// Reads requests until there are no more, or nobody takes them.
///
/// # Errors
/// The input cannot be read.
pub(super) async fn read(
    mut input: impl AsyncRead + Send + Unpin,
    to: mpsc::Sender<Item>,
) -> std::io::Result<()> {
    let mut begun = Vec::new();
    // The first line says which of the two it is.
    {
        let mut first = BufReader::new(&mut input);
        let mut line = Vec::new();
        while begun.iter().all(u8::is_ascii_whitespace)
            && bounded_line(&mut first, &mut line).await? > 0
        {
            begun.append(&mut line);
        }
        // What was read ahead belongs to the rest.
        begun.extend_from_slice(first.buffer());
    }
    let first = begun.trim_ascii_start().split(|byte| *byte == b'\n').next().unwrap_or_default();
    let in_lines = serde_json::from_slice::<Map<String, Value>>(first).is_ok();
    let may_be_document = first.first().is_some_and(|byte| matches!(byte, b'{' | b'['));
    if may_be_document && !in_lines {
        (&mut input).take(MAX_LINE).read_to_end(&mut begun).await?;
        if let Some(items) = document(&begun) {
            for item in items {
                if to.send(item).await.is_err() {
                    break;
                }
            }
            return Ok(());
        }
    }
    lines(BufReader::new(Cursor::new(begun).chain(input)), to).await
}

async fn lines(
    mut input: impl AsyncBufRead + Unpin,
    to: mpsc::Sender<Item>,
) -> std::io::Result<()> {
    let mut line = Vec::new();
    for number in 1u64.. {
        line.clear();
        let length = bounded_line(&mut input, &mut line).await?;
        if length == 0 {
            break;
        }
        if line.trim_ascii().is_empty() {
            continue;
        }
        let request = if length > MAX_LINE {
            Err(format!("is longer than {MAX_LINE} bytes"))
        } else {
            object(&line)
        };
        if to.send(Item { place: format!("line {number}"), request }).await.is_err() {
            break;
        }
    }
    Ok(())
}

/// Reads a line, of a long one the beginning, and returns how long it is.
async fn bounded_line(
    input: &mut (impl AsyncBufRead + Unpin),
    line: &mut Vec<u8>,
) -> std::io::Result<u64> {
    let mut length = (&mut *input).take(MAX_LINE + 1).read_until(b'\n', line).await? as u64;
    while length > MAX_LINE && line.last() != Some(&b'\n') {
        line.clear();
        let more = (&mut *input).take(MAX_LINE).read_until(b'\n', line).await? as u64;
        if more == 0 {
            break;
        }
        length += more;
    }
    Ok(length)
}

fn object(json: &[u8]) -> Result<Map<String, Value>, String> {
    serde_json::from_slice(json).map_err(|error| {
        // The position is that of a document; of a line the column is enough.
        let text = error.to_string();
        let text = text.replace(" at line 1 column ", " at column ");
        format!("is no JSON object: {text}")
    })
}

/// The requests in a document: one object, or a list of them. Nothing where it is none.
fn document(json: &[u8]) -> Option<Vec<Item>> {
    match serde_json::from_slice(json).ok()? {
        Value::Object(request) => {
            Some(vec![Item { place: "the document".to_owned(), request: Ok(request) }])
        }
        Value::Array(items) => {
            let item = |(at, value)| {
                let request = match value {
                    Value::Object(request) => Ok(request),
                    _ => Err("is no JSON object".to_owned()),
                };
                Item { place: format!("item {}", at + 1), request }
            };
            Some(items.into_iter().enumerate().map(item).collect())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    async fn items(text: &str) -> Vec<(String, Result<String, String>)> {
        let (to, mut from) = mpsc::channel(64);
        read(Cursor::new(text.as_bytes().to_vec()), to).await.unwrap();
        let mut all = Vec::new();
        while let Some(Item { place, request }) = from.recv().await {
            all.push((place, request.map(|request| Value::Object(request).to_string())));
        }
        all
    }

    fn ok(place: &str, json: &str) -> (String, Result<String, String>) {
        (place.to_owned(), Ok(json.to_owned()))
    }

    #[tokio::test]
    async fn lines_are_read_one_by_one() {
        let all = items("\n{\"a\":1}\n\n{\"b\": }\n[1]\r\n{\"c\":3}").await;
        assert_eq!(all.len(), 4);
        assert_eq!(all[0], ok("line 2", "{\"a\":1}"));
        assert_eq!(all[1].0, "line 4");
        let wrong = all[1].1.as_ref().unwrap_err();
        assert!(wrong.starts_with("is no JSON object: expected value at column"), "{wrong}");
        assert_eq!(all[2].0, "line 5");
        assert!(all[2].1.is_err());
        assert_eq!(all[3], ok("line 6", "{\"c\":3}"));
        assert_eq!(items("").await, []);
        assert_eq!(items("  \n \n").await, []);
    }

    #[tokio::test]
    async fn a_first_line_that_is_bad_does_not_spoil_the_others() {
        let all = items("{\"a\": oops}\n{\"b\":2}\n").await;
        assert!(all[0].0 == "line 1" && all[0].1.is_err());
        assert_eq!(all[1], ok("line 2", "{\"b\":2}"));
        let all = items("nonsense\n{\"b\":2}\n").await;
        assert!(all[0].0 == "line 1" && all[0].1.is_err());
        assert_eq!(all[1], ok("line 2", "{\"b\":2}"));
    }

    #[tokio::test]
    async fn a_document_may_take_several_lines() {
        assert_eq!(items("{\n  \"a\": 1\n}\n").await, [ok("the document", "{\"a\":1}")]);
        let all = items("[\n{\"a\":1},\n7,\n{\"b\":2}]").await;
        assert_eq!(all[0], ok("item 1", "{\"a\":1}"));
        assert_eq!(all[1], ("item 2".to_owned(), Err("is no JSON object".to_owned())));
        assert_eq!(all[2], ok("item 3", "{\"b\":2}"));
    }
}
