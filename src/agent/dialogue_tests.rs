#![allow(clippy::unwrap_used)]

use bytes::Bytes;
use proptest::prelude::*;

use super::super::frame::{self, Exit, HEADER, Kind, MAX_DATA, Malformed, Refusal, Step};
use super::{Dialogue, Said, Violation};

const EXIT: Exit = Exit { code: 7, oom_kills: Some(1), ran_us: 2, cpu_us: 3, peak_bytes: 4 };
const REFUSAL: Refusal = Refusal { step: Step::Exec, errno: 2 };

fn frames(list: &[(Kind, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (kind, payload) in list {
        frame::push(&mut bytes, *kind, payload);
    }
    bytes
}

/// What is heard of `bytes` that come in chunks of `size`, and what ended it.
fn hear(bytes: &[u8], size: usize) -> (Vec<Said>, Option<Violation>) {
    let (mut dialogue, mut heard) = (Dialogue::new(), Vec::new());
    for chunk in bytes.chunks(size) {
        dialogue.push(Bytes::copy_from_slice(chunk));
        loop {
            match dialogue.pull() {
                Ok(Some(said)) => heard.push(said),
                Ok(None) => break,
                Err(violation) => {
                    assert_eq!(dialogue.pull(), Err(violation), "it is said once more");
                    assert_eq!(dialogue.held(), 0);
                    return (heard, Some(violation));
                }
            }
        }
        assert!(dialogue.held() < HEADER + MAX_DATA);
    }
    (heard, None)
}

#[test]
fn a_dialogue_is_heard_however_it_is_cut() {
    let full = vec![b'x'; MAX_DATA];
    let bytes = frames(&[
        (Kind::Hello, &[frame::VERSION]),
        (Kind::Started, &[]),
        (Kind::Stdout, b"\0\xff"),
        (Kind::Stderr, b"e"),
        (Kind::Stdout, &full),
        (Kind::Exit, &EXIT.encode()),
    ]);
    let expected = vec![
        Said::Ready,
        Said::Started,
        Said::Stdout(Bytes::from_static(b"\0\xff")),
        Said::Stderr(Bytes::from_static(b"e")),
        Said::Stdout(full.clone().into()),
        Said::Exited(EXIT),
    ];
    for size in [1, 2, 4, 5, 6, 7, 1000, MAX_DATA, bytes.len()] {
        assert_eq!(hear(&bytes, size), (expected.clone(), None), "{size}");
    }
    // Pushed before it was asked for what was pushed before.
    let mut dialogue = Dialogue::new();
    for chunk in bytes.chunks(9000) {
        dialogue.push(Bytes::copy_from_slice(chunk));
    }
    for said in expected {
        assert_eq!(dialogue.pull(), Ok(Some(said)));
    }
    assert_eq!(dialogue.pull(), Ok(None));
}

#[test]
fn output_that_lies_in_a_chunk_whole_is_not_copied() {
    let hello = frames(&[(Kind::Hello, &[frame::VERSION]), (Kind::Started, &[])]);
    let chunk = Bytes::from(frames(&[(Kind::Stdout, b"output")]));
    let mut dialogue = Dialogue::new();
    dialogue.push(hello.into());
    while dialogue.pull().unwrap().is_some() {}
    dialogue.push(chunk.clone());
    let Some(Said::Stdout(output)) = dialogue.pull().unwrap() else { unreachable!() };
    assert_eq!(output.as_ptr(), chunk[HEADER..].as_ptr());
}

#[test]
fn what_no_agent_says_is_a_violation() {
    let hello = (Kind::Hello, &[frame::VERSION][..]);
    let started = (Kind::Started, &[][..]);
    let refused = REFUSAL.encode();
    let exit = EXIT.encode();
    let exit = (Kind::Exit, &exit[..]);
    let refused = (Kind::Refused, &refused[..]);
    let out_of_turn = Violation::OutOfTurn;
    for (list, heard, violation) in [
        (&[(Kind::Hello, &[9][..])][..], 0, Violation::Version(9)),
        (&[started], 0, out_of_turn(Kind::Started)),
        (&[exit], 0, out_of_turn(Kind::Exit)),
        (&[hello, hello], 1, out_of_turn(Kind::Hello)),
        (&[hello, (Kind::Stdout, b"x")], 1, out_of_turn(Kind::Stdout)),
        (&[hello, exit], 1, out_of_turn(Kind::Exit)),
        (&[hello, refused, started], 2, out_of_turn(Kind::Started)),
        (&[hello, refused, refused], 2, out_of_turn(Kind::Refused)),
        (&[hello, started, started], 2, out_of_turn(Kind::Started)),
        (&[hello, started, refused], 2, out_of_turn(Kind::Refused)),
        (&[hello, started, (Kind::Stdin, b"x")], 2, out_of_turn(Kind::Stdin)),
        (&[hello, started, (Kind::StdinEnd, b"")], 2, out_of_turn(Kind::StdinEnd)),
        (&[hello, started, (Kind::Start, b"x")], 2, out_of_turn(Kind::Start)),
        (&[hello, started, exit, exit], 3, out_of_turn(Kind::Exit)),
        (&[hello, started, exit, (Kind::Stderr, b"x")], 3, out_of_turn(Kind::Stderr)),
        (
            &[hello, (Kind::Refused, &[9; 5])],
            1,
            Violation::Malformed(Malformed("a refusal of no known step")),
        ),
        (
            &[hello, started, (Kind::Stdout, b"")],
            2,
            Violation::Malformed(Malformed("a frame of a length its kind cannot have")),
        ),
    ] {
        let bytes = frames(list);
        for size in [1, 3, bytes.len()] {
            let (said, ended) = hear(&bytes, size);
            assert_eq!((said.len(), ended), (heard, Some(violation)), "{list:?}");
        }
    }
}

#[test]
fn a_frame_that_may_not_come_is_refused_by_its_header() {
    let mut bytes = frames(&[(Kind::Hello, &[frame::VERSION])]);
    bytes.extend_from_slice(&frame::header(Kind::Start, frame::MAX_START));
    assert_eq!(hear(&bytes, 1), (vec![Said::Ready], Some(Violation::OutOfTurn(Kind::Start))));
}

#[derive(Clone, Debug)]
enum Output {
    Out(Vec<u8>),
    Err(Vec<u8>),
}

fn output() -> impl Strategy<Value = Output> {
    let data = || prop::collection::vec(any::<u8>(), 1..300);
    prop_oneof![data().prop_map(Output::Out), data().prop_map(Output::Err)]
}

proptest! {
    #[test]
    fn nothing_that_comes_is_too_much(
        hello: bool,
        bytes in prop::collection::vec(prop_oneof![Just(0), 1..=25_u8, any::<u8>()], 1..500),
        size in 1..50_usize,
    ) {
        let mut all = Vec::new();
        if hello {
            all = frames(&[(Kind::Hello, &[frame::VERSION]), (Kind::Started, &[])]);
        }
        all.extend_from_slice(&bytes);
        prop_assert_eq!(hear(&all, size), hear(&all, all.len()));
    }

    #[test]
    fn every_dialogue_is_heard(outputs in prop::collection::vec(output(), 0..20), size in 1..700_usize) {
        let exit = EXIT.encode();
        let mut list = vec![(Kind::Hello, &[frame::VERSION][..]), (Kind::Started, &[])];
        let mut expected = vec![Said::Ready, Said::Started];
        for output in &outputs {
            let (kind, data, said): (_, _, fn(Bytes) -> Said) = match output {
                Output::Out(data) => (Kind::Stdout, data, Said::Stdout),
                Output::Err(data) => (Kind::Stderr, data, Said::Stderr),
            };
            list.push((kind, data));
            expected.push(said(Bytes::copy_from_slice(data)));
        }
        list.push((Kind::Exit, &exit));
        expected.push(Said::Exited(EXIT));
        prop_assert_eq!(hear(&frames(&list), size), (expected, None));
    }
}
