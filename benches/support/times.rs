//! Times of several sides, measured in turn, and what is printed of them.

use std::time::{Duration, Instant};

use super::setting;

/// Rounds that fault pages in and make directories, and do not count; but not more than a quarter of those that do.
const FIRST: usize = 5;

/// Rounds of an interleaved measurement. `HOLM_BENCH_ROUNDS` changes it.
pub fn rounds() -> usize {
    setting("HOLM_BENCH_ROUNDS", 200)
}

/// The times of one side.
#[derive(Clone)]
pub struct Times {
    pub name: String,
    sorted: Vec<Duration>,
}

impl Times {
    pub fn new(name: &str, mut times: Vec<Duration>) -> Self {
        assert!(!times.is_empty(), "{name} was never measured");
        times.sort_unstable();
        Self { name: name.to_owned(), sorted: times }
    }

    /// The time that this part of all does not exceed.
    pub fn at(&self, part: f64) -> Duration {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // a part of a length
        let index = ((self.sorted.len() as f64 * part) as usize).min(self.sorted.len() - 1);
        self.sorted[index]
    }

    pub fn p50(&self) -> Duration {
        self.at(0.5)
    }

    pub fn p99(&self) -> Duration {
        self.at(0.99)
    }
}

/// `one` divided by `other`.
pub fn ratio(one: Duration, other: Duration) -> f64 {
    one.as_secs_f64() / other.as_secs_f64()
}

/// How long something takes, whatever comes of it.
pub fn timed<T>(work: impl FnOnce() -> T) -> Duration {
    let begun = Instant::now();
    work();
    begun.elapsed()
}

/// Runs all sides in turn, A B C A B C, so that whatever the machine does meanwhile happens to all of them. `round` is
/// one turn, and gives the time of each side.
pub fn interleave<const N: usize>(
    names: [&str; N],
    rounds: usize,
    mut round: impl FnMut() -> [Duration; N],
) -> [Times; N] {
    let mut times = [const { Vec::new() }; N];
    let first = FIRST.min(rounds / 4);
    for number in 0..rounds + first {
        let one = round();
        if number >= first {
            times.iter_mut().zip(one).for_each(|(times, time)| times.push(time));
        }
    }
    let mut times = times.into_iter();
    names.map(|name| Times::new(name, times.next().unwrap_or_default()))
}

/// Prints medians, spreads and 99th percentiles, and ratios to the first row's.
pub fn print_table<'a>(title: &str, rows: impl IntoIterator<Item = &'a Times>) {
    let rows: Vec<&Times> = rows.into_iter().collect();
    let floor = rows[0];
    println!("\n{title}: {} rounds, interleaved\n", floor.sorted.len());
    println!("| | p50 µs | p25 to p75 µs | p99 µs | p50 ÷ first | p99 ÷ first |\n|---|---:|---:|---:|---:|---:|");
    for row in rows {
        let us = |part: f64| row.at(part).as_secs_f64() * 1e6;
        println!(
            "| {} | {:.0} | {:.0} to {:.0} | {:.0} | {:.2} | {:.2} |",
            row.name,
            us(0.5),
            us(0.25),
            us(0.75),
            us(0.99),
            ratio(row.p50(), floor.p50()),
            ratio(row.p99(), floor.p99())
        );
    }
}
