#![allow(clippy::unwrap_used, clippy::panic)]

use super::*;
use futures::FutureExt;
use proptest::prelude::*;
use tokio::sync::mpsc;

const BOTH: [Stream; 2] = [Stream::Stdout, Stream::Stderr];

/// A log whose chunks arrive here.
fn received(limit: usize, max_chunk: usize) -> (LiveLog, mpsc::UnboundedReceiver<(Stream, Chunk)>) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let publish = move |stream, chunk| {
        let _ = sender.send((stream, chunk));
        futures::future::ready(()).boxed()
    };
    (LiveLog::start(publish, limit, max_chunk), receiver)
}

fn push(log: &LiveLog, stream: Stream, bytes: &[u8]) {
    log.push(stream, &Bytes::copy_from_slice(bytes));
}

async fn all(mut receiver: mpsc::UnboundedReceiver<(Stream, Chunk)>) -> [Vec<Chunk>; 2] {
    let mut chunks = [Vec::new(), Vec::new()];
    while let Some((stream, chunk)) = receiver.recv().await {
        chunks[usize::from(stream == Stream::Stderr)].push(chunk);
    }
    chunks
}

fn text(chunks: &[Chunk]) -> Vec<u8> {
    chunks.iter().flat_map(|chunk| chunk.bytes.to_vec()).collect()
}

#[tokio::test]
async fn both_streams_are_published_and_their_ends_marked() {
    let (log, receiver) = received(1 << 20, 1 << 10);
    push(&log, Stream::Stdout, b"out");
    push(&log, Stream::Stderr, b"err");
    push(&log, Stream::Stdout, b"put");
    assert_eq!(log.dropped(), 0);
    assert!(log.finish(Duration::from_secs(10)).await.unwrap());
    let [out, err] = all(receiver).await;
    assert_eq!((text(&out), text(&err)), (b"output".to_vec(), b"err".to_vec()));
    for (chunks, length) in [(out, 6), (err, 3)] {
        let end = Chunk {
            seq: chunks.len() as u64,
            offset: length,
            bytes: Bytes::new(),
            end: Some(End { dropped: 0 }),
        };
        assert_eq!(chunks.last(), Some(&end));
    }
}

#[tokio::test]
async fn a_function_that_prints_nothing_has_two_ends() {
    let (log, receiver) = received(1 << 20, 1 << 10);
    assert!(log.finish(Duration::from_secs(10)).await.unwrap());
    let [out, err] = all(receiver).await;
    assert_eq!((out.len(), err.len()), (1, 1));
    assert_eq!((out[0].seq, out[0].end), (1, Some(End { dropped: 0 })));
}

#[tokio::test]
async fn many_small_writes_are_few_chunks() {
    let (log, receiver) = received(1 << 20, 1 << 10);
    let input: Vec<u8> = (0..20_000_u32).map(|n| n.to_le_bytes()[0] & 0x7f).collect();
    for byte in &input {
        push(&log, Stream::Stdout, &[*byte]);
        tokio::task::yield_now().await;
    }
    log.finish(Duration::from_secs(10)).await.unwrap();
    let [out, _] = all(receiver).await;
    assert_eq!(text(&out), input);
    assert!(out.len() < 1000, "{}", out.len());
}

#[tokio::test]
async fn output_does_not_wait_for_the_end() {
    let (log, mut receiver) = received(1 << 20, 1 << 10);
    for line in ["one\n", "two\n", "three\n"] {
        push(&log, Stream::Stdout, line.as_bytes());
        assert_eq!(receiver.recv().await.unwrap().1.bytes, line);
    }
    // Half a character is nothing yet.
    push(&log, Stream::Stdout, &"é".as_bytes()[..1]);
    push(&log, Stream::Stderr, b"!");
    assert_eq!(receiver.recv().await.unwrap().1.bytes, "!");
    push(&log, Stream::Stdout, &"é".as_bytes()[1..]);
    let (_, chunk) = receiver.recv().await.unwrap();
    assert_eq!((chunk.seq, chunk.offset, &chunk.bytes[..]), (4, 14, "é".as_bytes()));
}

#[tokio::test]
async fn what_never_becomes_a_character_is_published_at_the_end() {
    let (log, receiver) = received(1 << 20, 1 << 10);
    push(&log, Stream::Stdout, b"ab\xe2\x82");
    log.finish(Duration::from_secs(10)).await.unwrap();
    let [out, _] = all(receiver).await;
    assert_eq!(text(&out), b"ab\xe2\x82");
    assert_eq!(out.iter().map(|chunk| chunk.seq).collect::<Vec<_>>(), [1, 2, 3]);
}

#[tokio::test]
async fn a_sink_that_never_answers_costs_no_more_than_the_limit() {
    let limit = 1 << 16;
    let log = LiveLog::start(|_, _| futures::future::pending().boxed(), limit, 1 << 10);
    let chunk = Bytes::from(vec![b'x'; 10_000]);
    for _ in 0..1_000 {
        log.push(Stream::Stdout, &chunk);
        log.push(Stream::Stderr, &chunk);
        assert!(log.shared.queue().held <= limit);
        tokio::task::yield_now().await;
    }
    assert_eq!(log.dropped(), 20_000_000 - limit as u64);
    assert!(!log.finish(Duration::from_millis(20)).await.unwrap());
}

#[tokio::test]
async fn a_log_that_is_dropped_ends_without_a_word() {
    let (log, mut receiver) = received(1 << 20, 1 << 10);
    drop(log);
    assert_eq!(receiver.recv().await, None);
}

#[test]
fn a_gap_cuts_no_character_in_two() {
    let mut queue = Queue::new(5, 100);
    let euro = "€".as_bytes();
    // There is room for "€" and two of the three bytes of another; the third and the first byte of the
    // next are lost, and the two with them, at once.
    queue.push(Stream::Stdout, &[euro, euro, &euro[..1]].concat());
    assert_eq!((queue.held, queue.dropped()), (3, 4));
    let Next::Chunk(_, chunk) = queue.next(true) else { panic!("nothing") };
    assert_eq!(&chunk.bytes[..], euro);
    queue.release(3);
    queue.push(Stream::Stdout, &euro[1..2]);
    queue.push(Stream::Stdout, &[&euro[2..], b"ab"].concat());
    let Next::Chunk(_, chunk) = queue.next(true) else { panic!("nothing") };
    assert_eq!((chunk.seq, chunk.offset, &chunk.bytes[..]), (2, 9, &b"ab"[..]));
    queue.release(2);
    assert_eq!((queue.held, queue.dropped()), (0, 6));
}

/// What happens to a queue.
#[derive(Clone, Debug)]
enum Step {
    /// This many of the bytes that are left arrive on one of the streams.
    Push(bool, usize),
    Take,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        2 => (any::<bool>(), 0_usize..20).prop_map(|(err, length)| Step::Push(err, length)),
        1 => Just(Step::Take),
    ];
    proptest::collection::vec(step, 0..200)
}

/// Sends both inputs through a queue of this size, and yields what came out of each.
fn through(
    inputs: [&[u8]; 2],
    steps: &[Step],
    limit: usize,
    max_chunk: usize,
) -> Result<[Vec<Chunk>; 2], TestCaseError> {
    let mut queue = Queue::new(limit, max_chunk);
    let mut chunks = [Vec::new(), Vec::new()];
    let mut rest = inputs;
    let whole = [Step::Push(false, usize::MAX), Step::Push(true, usize::MAX)];
    for step in steps.iter().chain(&whole) {
        match step {
            Step::Push(err, length) => {
                let lane = usize::from(*err);
                let (now, later) = rest[lane].split_at((*length).min(rest[lane].len()));
                rest[lane] = later;
                queue.push(BOTH[lane], now);
            }
            Step::Take => {
                take(&mut queue, &mut chunks, true);
            }
        }
        prop_assert!(queue.held <= limit);
    }
    queue.finished = true;
    while take(&mut queue, &mut chunks, false) {}
    prop_assert_eq!(queue.held, 0);
    for (input, chunks) in inputs.iter().zip(&chunks) {
        let (end, parts) = chunks.split_last().unwrap();
        let published: usize = parts.iter().map(|part| part.bytes.len()).sum();
        let dropped = (input.len() - published) as u64;
        prop_assert_eq!((end.offset, end.end), (input.len() as u64, Some(End { dropped })));
        let mut before = 0;
        for (part, seq) in chunks.iter().zip(1..) {
            prop_assert_eq!(part.seq, seq);
            prop_assert!(part.offset >= before);
            let offset = usize::try_from(part.offset).unwrap();
            before = part.offset + part.bytes.len() as u64;
            prop_assert_eq!(&part.bytes[..], &input[offset..offset + part.bytes.len()]);
            prop_assert!(part.bytes.len() <= max_chunk.max(4));
        }
        prop_assert!(parts.iter().all(|part| part.end.is_none() && !part.bytes.is_empty()));
    }
    Ok(chunks)
}

/// Takes a chunk, and says whether there was one.
fn take(queue: &mut Queue, chunks: &mut [Vec<Chunk>; 2], rested: bool) -> bool {
    let Next::Chunk(stream, chunk) = queue.next(rested) else { return false };
    queue.release(chunk.bytes.len());
    chunks[usize::from(stream == Stream::Stderr)].push(chunk);
    true
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn all_that_fits_is_published_as_it_was(
        out in proptest::collection::vec(any::<u8>(), 0..600),
        err in "\\PC{0,200}",
        steps in steps(),
        max_chunk in 0_usize..40,
    ) {
        let chunks = through([&out, err.as_bytes()], &steps, 1 << 20, max_chunk)?;
        prop_assert_eq!(text(&chunks[0]), out);
        prop_assert_eq!(text(&chunks[1]), err.as_bytes());
    }

    #[test]
    fn text_stays_text_whatever_is_dropped(
        out in "[a€é😀]{0,300}",
        err in "\\PC{0,200}",
        steps in steps(),
        limit in 0_usize..200,
        max_chunk in 0_usize..40,
    ) {
        for chunk in through([out.as_bytes(), err.as_bytes()], &steps, limit, max_chunk)?.concat() {
            prop_assert!(std::str::from_utf8(&chunk.bytes).is_ok(), "{:?}", chunk);
        }
    }

    #[test]
    fn bytes_that_are_no_text_are_bounded_too(
        out in proptest::collection::vec(any::<u8>(), 0..600),
        err in proptest::collection::vec(any::<u8>(), 0..600),
        steps in steps(),
        limit in 0_usize..200,
    ) {
        through([&out, &err], &steps, limit, 16)?;
    }
}
