//! The trace a job is part of, as [W3C Trace Context] has it.
//!
//! [W3C Trace Context]: https://www.w3.org/TR/trace-context/

/// The header that names the trace, and the caller's span in it. NATS' headers are told apart by case.
pub const TRACEPARENT: &str = "traceparent";
/// The header with what tracing systems say of it beside that.
pub const TRACESTATE: &str = "tracestate";

/// The longest state that is passed on, in bytes: what the specification has everyone pass on.
const MAX_STATE: usize = 512;

/// Of the flags, the one that says that the caller records the trace.
const SAMPLED: u8 = 1;
/// Of the flags, those that have a meaning today. Others are not passed on by who is a span itself.
const KNOWN_FLAGS: u8 = 3;

/// Where in a trace a job is. It is passed on to the function and onto the result: as it came, or, where
/// spans are exported, with this daemon's span as the parent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceContext {
    parent: String,
    state: Option<String>,
}

impl TraceContext {
    /// Of the headers of a message. Nothing where they name no trace, or not as the specification
    /// wants it: such a header is to be ignored.
    #[must_use]
    pub fn of<'a>(header: impl Fn(&str) -> Option<&'a str>) -> Option<Self> {
        let parent = header(TRACEPARENT).map(str::trim).filter(|parent| is_parent(parent))?;
        let is_state = |state: &&str| {
            let clean = state.bytes().all(|byte| (b' '..=b'~').contains(&byte));
            !state.is_empty() && state.len() <= MAX_STATE && clean
        };
        let state = header(TRACESTATE).map(str::trim).filter(is_state).map(str::to_owned);
        Some(Self { parent: parent.to_owned(), state })
    }

    /// The trace's own id: 32 hexadecimal digits.
    #[must_use]
    pub fn trace_id(&self) -> &str {
        &self.parent[3..35]
    }

    /// A trace that begins here, with this span. Neither id is zero.
    #[must_use]
    pub fn begin(trace_id: u128, span_id: u64, is_sampled: bool) -> Self {
        let flags = u8::from(is_sampled);
        Self { parent: format!("00-{trace_id:032x}-{span_id:016x}-{flags:02x}"), state: None }
    }

    /// The same trace, one step on: with this span as the parent. The id is not zero.
    #[must_use]
    pub fn with_parent(&self, span_id: u64) -> Self {
        let flags = self.flags() & KNOWN_FLAGS;
        let parent = format!("00-{}-{span_id:016x}-{flags:02x}", self.trace_id());
        Self { parent, state: self.state.clone() }
    }

    /// The span that is the parent of what follows: 16 hexadecimal digits.
    #[must_use]
    pub fn parent_id(&self) -> &str {
        &self.parent[36..52]
    }

    /// Whether its spans are to be recorded.
    #[must_use]
    pub fn is_sampled(&self) -> bool {
        self.flags() & SAMPLED != 0
    }

    /// The flags, as the specification has them.
    #[must_use]
    pub fn flags(&self) -> u8 {
        u8::from_str_radix(&self.parent[53..55], 16).unwrap_or_default()
    }

    /// What tracing systems say of it.
    #[must_use]
    pub fn state(&self) -> Option<&str> {
        self.state.as_deref()
    }

    /// The headers that pass it on.
    pub fn headers(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let state = self.state.as_deref().map(|state| (TRACESTATE, state));
        [(TRACEPARENT, self.parent.as_str())].into_iter().chain(state)
    }

    /// The variables that pass it on to a program: the headers' names in capitals, as OpenTelemetry
    /// has them.
    pub fn variables(&self) -> impl Iterator<Item = (String, &str)> {
        self.headers().map(|(name, value)| (name.to_ascii_uppercase(), value))
    }
}

/// Whether this is `VERSION-TRACE-SPAN-FLAGS`. Versions to come may have more behind that.
fn is_parent(text: &str) -> bool {
    let is_hex = |part: &str, length| {
        part.len() == length && part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    };
    let is_id = |part: &str, length| is_hex(part, length) && part.bytes().any(|b| b != b'0');
    let mut parts = text.split('-');
    let mut next = || parts.next().unwrap_or_default();
    let (version, trace, span, flags) = (next(), next(), next(), next());
    let is_known = version == "00";
    is_hex(version, 2)
        && version != "ff"
        && is_id(trace, 32)
        && is_id(span, 16)
        && is_hex(flags, 2)
        && (!is_known || parts.next().is_none())
        && text.len() <= MAX_STATE
        && text.bytes().all(|byte| byte.is_ascii_graphic())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn of(parent: &str, state: Option<&str>) -> Option<TraceContext> {
        TraceContext::of(|name| match name {
            TRACEPARENT => Some(parent),
            TRACESTATE => state,
            _ => None,
        })
    }

    #[test]
    fn a_trace_is_passed_on_as_it_came() {
        let trace = of(PARENT, Some("rojo=00f067aa0ba902b7")).unwrap();
        assert_eq!(trace.trace_id(), "4bf92f3577b34da6a3ce929d0e0e4736");
        let wanted = [(TRACEPARENT, PARENT), (TRACESTATE, "rojo=00f067aa0ba902b7")];
        assert_eq!(trace.headers().collect::<Vec<_>>(), wanted);
        let names: Vec<String> = trace.variables().map(|(name, _)| name).collect();
        assert_eq!(names, ["TRACEPARENT", "TRACESTATE"]);
        let later = "cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-what-comes";
        assert!(of(later, None).is_some());
    }

    #[test]
    fn a_span_of_ones_own_takes_the_callers_place() {
        let caller =
            of("cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-ff-more", Some("a=b"));
        let own = caller.unwrap().with_parent(0xab);
        let wanted = "00-4bf92f3577b34da6a3ce929d0e0e4736-00000000000000ab-03";
        assert_eq!(own.headers().collect::<Vec<_>>(), [(TRACEPARENT, wanted), (TRACESTATE, "a=b")]);
        assert_eq!((own.parent_id(), own.is_sampled()), ("00000000000000ab", true));
        assert_eq!(of(wanted, Some("a=b")), Some(own));
        let new = TraceContext::begin(1, 2, false);
        let wanted = "00-00000000000000000000000000000001-0000000000000002-00";
        assert_eq!(new.headers().collect::<Vec<_>>(), [(TRACEPARENT, wanted)]);
        assert!(!new.is_sampled());
    }

    #[test]
    fn what_is_no_trace_is_ignored() {
        for parent in [
            "",
            "00",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-\r\nX: y",
            "00-4bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-01",
            "é0-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        ] {
            assert_eq!(of(parent, None), None, "{parent:?}");
        }
        for state in ["", "a=\nb", &"x".repeat(513)] {
            let trace = of(PARENT, Some(state)).unwrap();
            assert_eq!(trace.headers().count(), 1, "{state:?}");
        }
    }
}
