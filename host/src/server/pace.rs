//! Pace: how long a peer may keep us waiting for bytes that it sends or takes.
//!
//! hyper has no time-outs for bodies and writes. What counts is time spent waiting for the peer, not time in which we
//! ourselves were busy: a job that reads slowly is no fault of its client.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep_until};

/// The rule: at least so many bytes a second after a first grace, and so long at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PaceRule {
    /// Waiting that is free.
    pub grace: Duration,
    /// Bytes that must come for each further second of waiting.
    pub bytes_per_second: u64,
    /// Waiting in all.
    pub most: Duration,
}

/// One body's books.
#[derive(Debug)]
pub(super) struct Pace {
    rule: PaceRule,
    bytes: u64,
    waited: Duration,
    since: Option<Instant>,
    alarm: Option<Pin<Box<Sleep>>>,
}

impl Pace {
    pub(super) fn new(rule: PaceRule) -> Self {
        Self { rule, bytes: 0, waited: Duration::ZERO, since: None, alarm: None }
    }

    /// Bytes have moved.
    pub(super) fn moved(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
        if let Some(since) = self.since.take() {
            self.waited += since.elapsed();
        }
    }

    /// The peer keeps us waiting. Ready when it has for too long; else the task is woken when it will have.
    pub(super) fn poll_waiting(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let since = *self.since.get_or_insert_with(Instant::now);
        let deadline = since + self.allowed().saturating_sub(self.waited);
        let alarm = self.alarm.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
        if alarm.deadline() != deadline {
            alarm.as_mut().reset(deadline);
        }
        alarm.as_mut().poll(cx)
    }

    /// Waiting that the bytes so far have earned.
    fn allowed(&self) -> Duration {
        let earned = Duration::from_secs(self.bytes / self.rule.bytes_per_second.max(1));
        (self.rule.grace + earned).min(self.rule.most)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    const RULE: PaceRule =
        PaceRule { grace: Duration::from_secs(10), bytes_per_second: 1024, most: Duration::from_secs(300) };

    async fn waits_for(pace: &mut Pace) -> Duration {
        let start = Instant::now();
        poll_fn(|cx| pace.poll_waiting(cx)).await;
        start.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_borne_for_the_grace_only() {
        let waited = waits_for(&mut Pace::new(RULE)).await;
        assert!(waited.abs_diff(Duration::from_secs(10)) < Duration::from_millis(10), "{waited:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_earn_time_up_to_the_most() {
        let mut pace = Pace::new(RULE);
        pace.moved(20 * 1024);
        assert_eq!(waits_for(&mut pace).await.as_secs(), 30);
        let mut pace = Pace::new(RULE);
        pace.moved(1 << 30);
        assert_eq!(waits_for(&mut pace).await.as_secs(), 300);
    }

    #[tokio::test(start_paused = true)]
    async fn time_in_which_nobody_waits_is_free() {
        let mut pace = Pace::new(RULE);
        tokio::time::sleep(Duration::from_secs(1000)).await;
        pace.moved(1);
        assert_eq!(waits_for(&mut pace).await.as_secs(), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn one_byte_at_a_time_runs_out() {
        let mut pace = Pace::new(RULE);
        let start = Instant::now();
        loop {
            let tick = tokio::time::sleep(Duration::from_secs(3));
            tokio::select! {
                () = poll_fn(|cx| pace.poll_waiting(cx)) => break,
                () = tick => pace.moved(1),
            }
        }
        assert_eq!(start.elapsed().as_secs(), 10);
    }
}
