//! The well-behaved neighbour: another tenant, whose small job is sent all along while others misbehave.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::server::Server;

/// A pause between its requests, as a client that is not a load test makes.
const PAUSE: Duration = Duration::from_millis(50);

/// The neighbour at work.
pub(super) struct Neighbour {
    stop: Arc<AtomicBool>,
    worker: JoinHandle<Service>,
}

/// How it was served.
#[derive(Debug, Default)]
pub(super) struct Service {
    /// Requests that were answered rightly.
    pub(super) answered: usize,
    /// Requests that were not, with the first failure.
    pub(super) failed: Vec<String>,
    times: Vec<Duration>,
}

impl Service {
    fn at(&self, part: f64) -> Duration {
        let mut times = self.times.clone();
        times.sort_unstable();
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
        let index = ((times.len() as f64 * part) as usize).min(times.len().saturating_sub(1));
        times.get(index).copied().unwrap_or_default()
    }

    pub(super) fn words(&self) -> String {
        let ms = |d: Duration| format!("{:.1} ms", d.as_secs_f64() * 1000.0);
        let total = self.answered + self.failed.len();
        format!("{} of {total} answered, median {}, slowest {}", self.answered, ms(self.at(0.5)), ms(self.at(1.0)))
    }
}

impl Neighbour {
    /// Begins to send.
    pub(super) fn start(server: Arc<Server>, path: &'static str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let worker = std::thread::spawn(move || {
            let mut service = Service::default();
            while !stopped.load(Ordering::Relaxed) {
                let begun = Instant::now();
                match server.send("POST", path, &[], b"good morning") {
                    Ok(answer) if answer.status == 200 && answer.body == b"good morning" => {
                        service.answered += 1;
                        service.times.push(begun.elapsed());
                    }
                    Ok(answer) => service.failed.push(String::from_utf8_lossy(&answer.body).into_owned()),
                    Err(error) => service.failed.push(format!("{error:#}")),
                }
                std::thread::sleep(PAUSE);
            }
            service
        });
        Self { stop, worker }
    }

    /// Stops sending, and tells how it went.
    pub(super) fn stop(self) -> Service {
        self.stop.store(true, Ordering::Relaxed);
        self.worker.join().unwrap_or_default()
    }
}
