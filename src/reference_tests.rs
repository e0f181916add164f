#![allow(clippy::unwrap_used)]

use oci_spec::distribution::Reference as Theirs;
use proptest::prelude::*;

use super::*;

fn full(text: &str) -> Result<String, Malformed> {
    text.parse::<Reference>().map(|reference| reference.to_string())
}

fn digest(algorithm: &str, length: usize) -> String {
    format!("{algorithm}:{}", "a0".repeat(length / 2))
}

#[test]
fn references_are_completed() {
    let sha256 = digest("sha256", 64);
    for (short, expected) in [
        ("python", "docker.io/library/python:latest".to_owned()),
        ("python:3.11-slim", "docker.io/library/python:3.11-slim".to_owned()),
        ("team/tool", "docker.io/team/tool:latest".to_owned()),
        ("docker.io/python", "docker.io/library/python:latest".to_owned()),
        ("index.docker.io/team/tool", "docker.io/team/tool:latest".to_owned()),
        ("ghcr.io/team/tool:1", "ghcr.io/team/tool:1".to_owned()),
        ("localhost/tool", "localhost/tool:latest".to_owned()),
        ("host:5000/tool", "host:5000/tool:latest".to_owned()),
        ("host:5000", "docker.io/library/host:5000".to_owned()),
        ("127.0.0.1:5000/a/b/c", "127.0.0.1:5000/a/b/c:latest".to_owned()),
        ("a__b--c_d/e.f---g:_T.-", "docker.io/a__b--c_d/e.f---g:_T.-".to_owned()),
        (&format!("python@{sha256}"), format!("docker.io/library/python@{sha256}")),
        (&format!("python:3@{sha256}"), format!("docker.io/library/python:3@{sha256}")),
    ] {
        assert_eq!(full(short).as_ref(), Ok(&expected), "{short}");
        // What is complete stays as it is.
        assert_eq!(full(&expected).as_ref(), Ok(&expected), "{short}");
    }
}

#[test]
fn parts_are_told_apart() {
    let text = format!("ghcr.io:443/team/tool:1@{}", digest("sha512", 128));
    let reference: Reference = text.parse().unwrap();
    assert_eq!(reference.registry(), "ghcr.io:443");
    assert_eq!(reference.repository(), "team/tool");
    assert_eq!(reference.tag(), Some("1"));
    assert_eq!(reference.digest(), Some(digest("sha512", 128).as_str()));
    let by_digest: Reference = format!("tool@{}", digest("sha384", 96)).parse().unwrap();
    assert_eq!(by_digest.tag(), None);
}

#[test]
fn what_is_no_reference_is_told_why() {
    use Malformed::{Digest, Registry, Repository, Tag, TooLong, UpperCase};
    let long = "a".repeat(MAX_REPOSITORY - "library/".len());
    assert!(full(&long).is_ok());
    let long_tag = format!("a:{}", "t".repeat(MAX_TAG));
    assert!(full(&long_tag).is_ok());
    for (text, why) in [
        ("", Repository),
        (":tag", Repository),
        ("/a", Repository),
        ("a/", Repository),
        ("a//b", Repository),
        ("-a", Repository),
        ("a.", Repository),
        ("a..b", Repository),
        ("a___b", Repository),
        ("a-.b", Repository),
        ("a b", Repository),
        ("\u{e9}", Repository),
        ("../../etc/passwd", Registry),
        ("busybox\nbusybox", Repository),
        ("Busybox", UpperCase),
        ("Team/tool", UpperCase),
        ("ghcr.io/Team/tool", UpperCase),
        (&format!("{long}a"), TooLong),
        (".io/a", Registry),
        ("host:/a", Registry),
        ("host:5o/a", Registry),
        ("http://host/a", Registry),
        ("-host.io/a", Registry),
        ("[::1]:5000/a", Registry),
        ("a:", Tag),
        ("a:.1", Tag),
        ("a:-1", Tag),
        ("a:1:2", Tag),
        ("a:not a tag", Tag),
        ("a:\u{e9}", Tag),
        (&format!("{long_tag}t"), Tag),
        ("a@", Digest),
        ("a@sha256", Digest),
        ("a@sha256:abc", Digest),
        (&format!("a@{}", digest("sha256", 66)), Digest),
        (&format!("a@{}", digest("md5", 64)), Digest),
        (&format!("a@{}", digest("sha256", 64).replace('a', "A")), Digest),
        (&format!("a@{0}@{0}", digest("sha256", 64)), Digest),
    ] {
        assert_eq!(full(text), Err(why), "{text:?}");
    }
}

/// Texts that are nearly references, often enough.
fn texts() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        8 => "[a-z0-9]{1,3}",
        1 => "[A-Z]",
        4 => r"[-._/:@]",
        1 => "__|---|[.][.]|\u{e9}|\n| ",
        1 => Just("localhost/".to_owned()),
        1 => Just("index.docker.io/".to_owned()),
        1 => Just(":5000/".to_owned()),
        1 => (0..3_usize, 0..3_usize, prop_oneof![Just("0f"), Just("0F"), Just("xy")]).prop_map(
            |(algorithm, length, digits)| {
                let algorithm = ["sha256", "sha512", "md5"][algorithm];
                format!("@{algorithm}:{}", digits.repeat([32, 33, 64][length]))
            },
        ),
    ];
    proptest::collection::vec(piece, 0..8).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 5_000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// But for three things in which it takes more than engines do: a repository with capitals where
    /// that could be the name of a host, a tag beyond ASCII, and a digest in capitals.
    #[test]
    fn references_are_those_of_the_specifications_own_library(text in texts()) {
        let theirs = text.parse::<Theirs>().ok();
        let capitals = |part: &str| part.contains(|c: char| c.is_ascii_uppercase());
        let theirs = theirs.filter(|r| !capitals(r.repository()) && !r.digest().is_some_and(capitals));
        let theirs = theirs.filter(|r| r.tag().is_none_or(str::is_ascii));
        prop_assert_eq!(full(&text).ok(), theirs.map(|reference| reference.whole()));
    }
}
