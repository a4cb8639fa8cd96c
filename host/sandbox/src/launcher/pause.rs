//! The clock of a sandbox that can be made to stand still.

use std::time::{Duration, Instant};

/// For how long a sandbox has stood still, and whether it does so now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Pause {
    /// It has been frozen by an order for it alone, or is about to be; its tenant may be besides.
    pub(super) own: bool,
    /// Since when its clocks stand.
    since: Option<Instant>,
    /// For how long they did before.
    before: Duration,
}

impl Pause {
    /// That of a sandbox whose clocks stand from its birth on, or do not.
    pub(super) fn of_newborn(frozen: bool, now: Instant) -> Self {
        Self { since: frozen.then_some(now), ..Self::default() }
    }

    /// Whether the clocks stand.
    pub(super) fn stands(&self) -> bool {
        self.since.is_some()
    }

    /// Nothing runs any more.
    pub(super) fn stop(&mut self, now: Instant) {
        self.since.get_or_insert(now);
    }

    /// Something may run again.
    pub(super) fn go_on(&mut self, now: Instant) {
        self.before = self.total(now);
        self.since = None;
    }

    /// Tenant code starts; what was before does not count.
    pub(super) fn begin(&mut self, now: Instant) {
        self.before = Duration::ZERO;
        if self.since.is_some() {
            self.since = Some(now);
        }
    }

    /// How long the clocks have stood so far.
    pub(super) fn total(&self, now: Instant) -> Duration {
        self.before + self.since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_add_up_and_those_before_the_start_do_not_count() {
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let mut pause = Pause::of_newborn(true, begin);
        pause.begin(at(5));
        assert_eq!((pause.stands(), pause.total(at(7))), (true, Duration::from_secs(2)));
        pause.stop(at(8)); // it stands already
        pause.go_on(at(9));
        assert_eq!((pause.stands(), pause.total(at(20))), (false, Duration::from_secs(4)));
        pause.go_on(at(21));
        pause.stop(at(22));
        assert_eq!(pause.total(at(25)), Duration::from_secs(7));
        pause.go_on(at(25));
        assert_eq!(pause.total(at(99)), Duration::from_secs(7));
    }
}
