//! Whatever comes out of a container, however it is cut: no panic, no more kept than may be, the same
//! events in the order in which they may come.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use worker_spawner_fuzz::dialogue::{Dialogue, Said, Violation};
use worker_spawner_fuzz::frame::{HEADER, MAX_DATA};

fuzz_target!(|input: (u16, &[u8])| {
    let (size, bytes) = input;
    let whole = hear(bytes.chunks(bytes.len().max(1)));
    assert!(in_order(&whole.0));
    assert_eq!(hear(bytes.chunks(usize::from(size).max(1))), whole);
});

fn hear<'a>(chunks: impl Iterator<Item = &'a [u8]>) -> (Vec<Said>, Option<Violation>) {
    let (mut dialogue, mut heard) = (Dialogue::new(), Vec::new());
    for chunk in chunks {
        dialogue.push(Bytes::copy_from_slice(chunk));
        loop {
            match dialogue.pull() {
                Ok(Some(said)) => heard.push(said),
                Ok(None) => break,
                Err(violation) => {
                    assert_eq!(dialogue.pull(), Err(violation));
                    return (heard, Some(violation));
                }
            }
        }
        assert!(dialogue.held() < HEADER + MAX_DATA);
    }
    (heard, None)
}

fn in_order(heard: &[Said]) -> bool {
    let is_output = |said: &Said| match said {
        Said::Stdout(bytes) | Said::Stderr(bytes) => (1..=MAX_DATA).contains(&bytes.len()),
        _ => false,
    };
    match heard {
        [] | [Said::Ready] | [Said::Ready, Said::Refused(_)] => true,
        [Said::Ready, Said::Started, outputs @ .., Said::Exited(_)]
        | [Said::Ready, Said::Started, outputs @ ..] => outputs.iter().all(is_output),
        _ => false,
    }
}
