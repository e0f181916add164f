//! Whatever is taken for a start is one, and is written as it was read.
#![no_main]

use libfuzzer_sys::fuzz_target;
use worker_spawner_fuzz::frame::Start;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(start) = Start::decode(bytes) {
        assert!(!start.argv.is_empty());
        assert_eq!(start.encode().as_deref(), Some(bytes));
    }
});
