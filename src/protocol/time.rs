//! Points in time on the wire: RFC 3339.

use std::time::SystemTime;

/// RFC 3339 in UTC, to the microsecond.
#[must_use]
pub fn rfc3339(time: SystemTime) -> String {
    match jiff::Timestamp::try_from(time) {
        Ok(timestamp) => format!("{timestamp:.6}"),
        // Only a clock set tens of thousands of years off gets here.
        Err(_) => "1970-01-01T00:00:00Z".to_owned(),
    }
}

/// The point in time that `text` names, with any offset from UTC.
///
/// Only what RFC 3339 allows: the parser takes other notations too, and what one day's version of
/// it takes is no contract.
#[must_use]
pub fn parse_rfc3339(text: &str) -> Option<SystemTime> {
    if !has_shape(text.as_bytes()) {
        return None;
    }
    text.parse::<jiff::Timestamp>().ok().map(SystemTime::from)
}

/// Whether `text` looks like `2024-05-06T07:08:09Z`, with or without a fraction or an offset.
fn has_shape(text: &[u8]) -> bool {
    fn like(text: &[u8], pattern: &[u8]) -> bool {
        let matches = |(byte, wanted): (&u8, &u8)| match wanted {
            b'0' => byte.is_ascii_digit(),
            b'+' => matches!(byte, b'+' | b'-'),
            wanted => byte.eq_ignore_ascii_case(wanted),
        };
        text.len() == pattern.len() && text.iter().zip(pattern).all(matches)
    }
    let Some((seconds, rest)) = text.split_at_checked("0000-00-00T00:00:00".len()) else {
        return false;
    };
    let zone = match rest.split_first() {
        Some((b'.', fraction)) => {
            let digits = fraction.iter().take_while(|byte| byte.is_ascii_digit()).count();
            if digits == 0 {
                return false;
            }
            &fraction[digits..]
        }
        _ => rest,
    };
    like(seconds, b"0000-00-00T00:00:00") && (like(zone, b"Z") || like(zone, b"+00:00"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn only_rfc_3339_is_read() {
        let at = SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_250);
        for text in [
            "2023-11-14T22:13:20.250000Z",
            "2023-11-14t22:13:20.25z",
            "2023-11-14T23:13:20.250+01:00",
            "2023-11-14T16:43:20.25-05:30",
        ] {
            assert_eq!(parse_rfc3339(text), Some(at), "{text}");
        }
        assert_eq!(parse_rfc3339(&rfc3339(at)), Some(at));
        for text in [
            "",
            "2023-11-14",
            "2023-11-14T22:13Z",
            "2023-11-14T22:13:20",
            "2023-11-14T22:13:20.Z",
            "2023-11-14T22:13:20,5Z",
            "2023-11-14T22:13:20+01",
            "2023-11-14T22:13:20+01:00[Europe/Paris]",
            "20231114T221320Z",
            "2023-13-14T22:13:20Z",
            "2023-02-30T22:13:20Z",
            "2023-11-14T25:13:20Z",
            " 2023-11-14T22:13:20Z",
            "2023-11-14T22:13:20Z ",
            "1700000000",
            "tomorrow",
            "2023-11-14T22:13:2é",
        ] {
            assert_eq!(parse_rfc3339(text), None, "{text}");
        }
    }
}
