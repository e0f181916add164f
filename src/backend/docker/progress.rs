//! How far a pull is, from what the engine says of each layer. Pure.

use std::collections::HashMap;

use bollard::models::CreateImageInfo;

use crate::job::PullProgress;

/// The layers of a pull, as far as the engine has spoken of them.
#[derive(Debug, Default)]
pub(super) struct Layers(HashMap<String, Layer>);

#[derive(Clone, Copy, Debug, Default)]
struct Layer {
    bytes: u64,
    bytes_done: u64,
    done: bool,
}

impl Layers {
    /// Takes what the engine said.
    pub(super) fn observe(&mut self, said: &CreateImageInfo) {
        let (Some(id), Some(status)) = (&said.id, &said.status) else { return };
        let detail = said.progress_detail.as_ref();
        let number = |n: Option<i64>| n.and_then(|n| u64::try_from(n).ok()).filter(|n| *n > 0);
        let total = number(detail.and_then(|d| d.total));
        let current = number(detail.and_then(|d| d.current));
        // Not all that has an id is a layer: the tag has one, too.
        match status.as_str() {
            "Pulling fs layer" | "Waiting" => {
                self.0.entry(id.clone()).or_default();
            }
            "Downloading" => {
                let layer = self.0.entry(id.clone()).or_default();
                layer.bytes = total.unwrap_or(layer.bytes);
                layer.bytes_done = current.unwrap_or(0);
                if total.is_some() {
                    layer.bytes_done = layer.bytes_done.min(layer.bytes);
                }
            }
            // A small layer is fetched before the engine has said how large it is.
            "Verifying Checksum" | "Download complete" | "Extracting" => {
                let layer = self.0.entry(id.clone()).or_default();
                layer.bytes = layer.bytes.max(total.unwrap_or(0));
                layer.bytes_done = layer.bytes;
            }
            "Pull complete" | "Already exists" => {
                let layer = self.0.entry(id.clone()).or_default();
                layer.bytes_done = layer.bytes;
                layer.done = true;
            }
            _ => {}
        }
    }

    /// All layers together.
    pub(super) fn total(&self) -> PullProgress {
        let mut total = PullProgress::default();
        for layer in self.0.values() {
            total.layers += 1;
            total.layers_done += u64::from(layer.done);
            total.bytes = total.bytes.saturating_add(layer.bytes);
            total.bytes_done = total.bytes_done.saturating_add(layer.bytes_done);
        }
        total
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bollard::models::ProgressDetail;

    fn said(id: &str, status: &str, progress: Option<(i64, i64)>) -> CreateImageInfo {
        let detail = |(current, total): (i64, i64)| ProgressDetail {
            current: (current != 0).then_some(current),
            total: (total != 0).then_some(total),
        };
        CreateImageInfo {
            id: (!id.is_empty()).then(|| id.to_owned()),
            status: Some(status.to_owned()),
            progress_detail: progress.map(detail),
            error_detail: None,
        }
    }

    #[test]
    fn a_pull_is_the_sum_of_its_layers() {
        let mut layers = Layers::default();
        let none = Some((0, 0));
        for (id, status, progress, wanted) in [
            ("3.11-slim", "Pulling from library/python", None, [0, 0, 0, 0]),
            ("a", "Pulling fs layer", none, [1, 0, 0, 0]),
            ("b", "Pulling fs layer", none, [2, 0, 0, 0]),
            ("c", "Already exists", none, [3, 1, 0, 0]),
            ("b", "Waiting", none, [3, 1, 0, 0]),
            ("a", "Downloading", Some((10, 100)), [3, 1, 100, 10]),
            ("a", "Downloading", Some((60, 100)), [3, 1, 100, 60]),
            ("a", "Retrying in 5 seconds", none, [3, 1, 100, 60]),
            ("a", "Downloading", Some((5, 100)), [3, 1, 100, 5]),
            ("b", "Downloading", Some((20, 0)), [3, 1, 100, 25]),
            ("b", "Download complete", none, [3, 1, 100, 5]),
            ("a", "Verifying Checksum", none, [3, 1, 100, 100]),
            ("a", "Download complete", none, [3, 1, 100, 100]),
            ("a", "Extracting", Some((1, 100)), [3, 1, 100, 100]),
            ("b", "Extracting", Some((1, 30)), [3, 1, 130, 130]),
            ("a", "Pull complete", none, [3, 2, 130, 130]),
            ("b", "Pull complete", none, [3, 3, 130, 130]),
            ("", "Digest: sha256:0", None, [3, 3, 130, 130]),
            ("", "Status: Downloaded newer image for python:3.11-slim", None, [3, 3, 130, 130]),
        ] {
            layers.observe(&said(id, status, progress));
            let PullProgress { layers, layers_done, bytes, bytes_done } = layers.total();
            assert_eq!([layers, layers_done, bytes, bytes_done], wanted, "{id} {status}");
        }
    }

    #[test]
    fn nonsense_does_no_harm() {
        let mut layers = Layers::default();
        layers.observe(&CreateImageInfo::default());
        layers.observe(&said("a", "Downloading", Some((-1, -1))));
        layers.observe(&said("b", "Downloading", Some((9, 3))));
        layers.observe(&said("c", "Downloading", Some((i64::MAX, i64::MAX))));
        layers.observe(&said("d", "Downloading", Some((i64::MAX, i64::MAX))));
        layers.observe(&said("e", "Extracting", Some((i64::MAX, i64::MAX))));
        let total = layers.total();
        assert_eq!((total.layers, total.bytes), (5, u64::MAX));
        assert!(total.bytes_done <= total.bytes);
    }
}
