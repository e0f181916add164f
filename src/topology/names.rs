//! What streams, consumers and buckets are called.

use crate::job::Priority;
use crate::protocol::Subjects;

/// The names of everything, from the subjects' prefix and the queue group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names {
    /// The stream of requests.
    pub queue: String,
    /// The stream of results.
    pub results: String,
    /// The stream of dead letters.
    pub dead_letters: String,
    /// The stream of the server's notices that a request was delivered for the last time.
    pub advisories: String,
    /// The bucket of job records.
    pub jobs: String,
    /// The bucket of big inputs and outputs.
    pub objects: String,
    /// The queue group as a consumer's name.
    group: String,
}

impl Names {
    /// The names under a prefix. A stream's name cannot hold a dot, so dots become underscores.
    #[must_use]
    pub fn new(subjects: &Subjects, queue_group: &str) -> Self {
        let base = subjects.prefix().replace('.', "_");
        let name = |what: &str| format!("{base}_{what}");
        Self {
            queue: name("queue"),
            results: name("results"),
            dead_letters: name("dead_letters"),
            advisories: name("advisories"),
            jobs: name("jobs"),
            objects: name("objects"),
            group: queue_group.replace('.', "_"),
        }
    }

    /// The consumer of the requests of this priority.
    #[must_use]
    pub fn consumer(&self, priority: Priority) -> String {
        match priority {
            Priority::Normal => self.group.clone(),
            other => format!("{}_{}", self.group, other.as_str()),
        }
    }

    /// The consumer of the advisories.
    #[must_use]
    pub fn advisory_consumer(&self) -> String {
        self.group.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_hold_no_dots() {
        let names = Names::new(&Subjects::new("team.functions"), "my.group");
        assert_eq!(names.queue, "team_functions_queue");
        assert_eq!(names.consumer(Priority::Normal), "my_group");
        assert_eq!(names.consumer(Priority::High), "my_group_high");
    }
}
