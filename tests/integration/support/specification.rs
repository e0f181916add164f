//! The published schemas, which everything that is seen here must fit.

use std::sync::LazyLock;

use jsonschema::Validator;
use serde_json::Value;

fn validator(schema: &str) -> Validator {
    jsonschema::validator_for(&serde_json::from_str(schema).unwrap()).unwrap()
}

fn assert_fits(validator: &Validator, value: &Value) {
    let faults: Vec<String> = validator
        .iter_errors(value)
        .map(|fault| format!("{}: {fault:.200}", fault.instance_path()))
        .collect();
    assert!(faults.is_empty(), "it does not fit its schema: {value:.2000}: {faults:?}");
}

/// Asserts that this is an outcome as it is specified.
pub(crate) fn assert_outcome(outcome: &Value) {
    static OUTCOME: LazyLock<Validator> = LazyLock::new(|| {
        validator(include_str!("../../../docs/specifications/outcome.schema.json"))
    });
    assert_fits(&OUTCOME, outcome);
}

/// Asserts that this is an event as it is specified.
pub(crate) fn assert_event(event: &Value) {
    static EVENT: LazyLock<Validator> =
        LazyLock::new(|| validator(include_str!("../../../docs/specifications/event.schema.json")));
    assert_fits(&EVENT, event);
}
