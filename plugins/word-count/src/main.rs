//! Counts lines, words and bytes of its input, and its most frequent words.
//!
//! `word-count [--top N]`: N is the number of frequent words shown, 5 if not given. A word is a run of letters, digits
//! and apostrophes; frequent words are counted without regard to case. Output is text, one `name count` a line.

use std::collections::BTreeMap;
use std::io::{BufRead, Write};
use std::process::ExitCode;

use holm_sdk::{Job, Result};

/// Distinct words that are counted. Words that first appear when there are this many are still counted in the total.
const MAX_DISTINCT: usize = 100_000;

/// The longest line that is held: input without line ends must not fill the memory.
const MAX_LINE: u64 = 1 << 20;

fn main() -> ExitCode {
    holm_sdk::command(word_count)
}

fn word_count(job: &mut Job) -> Result {
    let top = top(job.args())?;
    let mut counts = Counts::default();
    let mut line = Vec::new();
    while {
        line.clear();
        std::io::Read::take(job.input(), MAX_LINE).read_until(b'\n', &mut line)? > 0
    } {
        counts.add(&line);
    }
    let out = job.output();
    writeln!(out, "lines {}\nwords {}\nbytes {}", counts.lines, counts.words, counts.bytes)?;
    for (word, count) in counts.most_frequent(top) {
        writeln!(out, "{word} {count}")?;
    }
    Ok(())
}

fn top(args: &[String]) -> Result<usize> {
    match args {
        [] => Ok(5),
        [flag, number] if flag == "--top" => {
            number.parse().map_err(|_| format!("--top takes a number, not `{number}`").into())
        }
        _ => Err("usage: word-count [--top N]".into()),
    }
}

#[derive(Default)]
struct Counts {
    lines: u64,
    words: u64,
    bytes: u64,
    /// Ordered, so that nothing depends on a random hash seed: the same input uses the same fuel.
    distinct: BTreeMap<String, u64>,
}

impl Counts {
    fn add(&mut self, line: &[u8]) {
        self.bytes += line.len() as u64;
        self.lines += u64::from(line.ends_with(b"\n"));
        let text = String::from_utf8_lossy(line);
        for word in text.split(|c: char| !(c.is_alphanumeric() || c == '\'')).filter(|word| !word.is_empty()) {
            self.words += 1;
            let word = word.to_lowercase();
            if self.distinct.len() < MAX_DISTINCT || self.distinct.contains_key(&word) {
                *self.distinct.entry(word).or_default() += 1;
            }
        }
    }

    /// The `n` most frequent words, the most frequent first, equally frequent ones in alphabetical order.
    fn most_frequent(self, n: usize) -> Vec<(String, u64)> {
        let mut words: Vec<(String, u64)> = self.distinct.into_iter().collect();
        words.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        words.truncate(n);
        words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_lines_words_and_bytes() {
        let mut counts = Counts::default();
        counts.add("The cat, the DOG — and the cat's\n".as_bytes());
        counts.add(b"end");
        assert_eq!((counts.lines, counts.words, counts.bytes), (1, 8, 38));
        let top = counts.most_frequent(2);
        assert_eq!(top, [("the".to_owned(), 3), ("and".to_owned(), 1)]);
    }

    #[test]
    fn arguments_are_checked() {
        assert_eq!(top(&[]).unwrap(), 5);
        assert_eq!(top(&["--top".into(), "9".into()]).unwrap(), 9);
        assert!(top(&["--top".into(), "x".into()]).unwrap_err().to_string().contains("`x`"));
        assert!(top(&["what".into()]).is_err());
    }
}
