//! The agent: waits in a container for the one function it is there to run.

fn main() {}
