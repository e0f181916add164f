//! The trace a job is part of, as [W3C Trace Context] has it.
//!
//! [W3C Trace Context]: https://www.w3.org/TR/trace-context/

/// The header that names the trace, and the caller's span in it. NATS' headers are told apart by case.
pub const TRACEPARENT: &str = "traceparent";
/// The header with what tracing systems say of it beside that.
pub const TRACESTATE: &str = "tracestate";

/// The longest state that is passed on, in bytes: what the specification has everyone pass on.
const MAX_STATE: usize = 512;

/// Where in a trace a job is. It is passed on as it came: to the function and onto the result.
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
