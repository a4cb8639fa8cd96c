//! Requests under load: at a rate that the clock gives, or as many as a number of connections can.
//!
//! The client shares the CPUs with what it measures. So it is by hand, one thread a connection, and costs the same for all
//! that is measured.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

/// Connections of an open loop. Each has a request as often as the rate divided by this: only one that takes longer than
/// that makes the next late, which then counts as that one's.
const OPEN_CONNECTIONS: u32 = 16;

/// A request, to be sent again and again.
#[derive(Clone)]
pub struct Requests {
    address: String,
    head: String,
}

impl Requests {
    pub fn new(url: &str, path: &str, key: Option<&str>) -> Self {
        let address = url.trim_start_matches("http://").trim_end_matches('/').to_owned();
        let key = key.map_or_else(String::new, |key| format!("authorization: Bearer {key}\r\n"));
        let head = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\n{key}\r\n");
        Self { address, head }
    }

    pub fn connect(&self) -> Connection<'_> {
        let stream = TcpStream::connect(&self.address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        Connection { requests: self, stream, answer: Vec::new() }
    }

    /// Sends `per_second` for `time`, whatever becomes of those before. Gives how long after its moment each was answered.
    pub fn open_loop(&self, per_second: u32, time: Duration) -> Vec<Duration> {
        let interval = Duration::from_secs(1) / per_second;
        let begin = Instant::now() + Duration::from_millis(50);
        let one = |first: u32| {
            let mut connection = self.connect();
            let moments = (first..).step_by(OPEN_CONNECTIONS as usize).map(|number| interval * number);
            let answered = moments.take_while(|after| *after < time).map(|after| {
                thread::sleep((begin + after).saturating_duration_since(Instant::now()));
                connection.ask();
                (begin + after).elapsed()
            });
            answered.collect::<Vec<_>>()
        };
        thread::scope(|scope| {
            let threads: Vec<_> = (0..OPEN_CONNECTIONS).map(|first| scope.spawn(move || one(first))).collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        })
    }

    /// Sends what so many connections can, `most` each and for `time` at the longest. Gives how many a second, and how many.
    pub fn closed_loop(&self, connections: usize, most: usize, time: Duration) -> (f64, usize) {
        let begun = Instant::now();
        let one = || {
            let mut connection = self.connect();
            (0..most).take_while(|_| begun.elapsed() < time).map(|_| connection.ask()).count()
        };
        let count: usize = thread::scope(|scope| {
            let threads: Vec<_> = (0..connections).map(|_| scope.spawn(one)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        (count as f64 / begun.elapsed().as_secs_f64(), count)
    }
}

pub struct Connection<'a> {
    requests: &'a Requests,
    stream: TcpStream,
    answer: Vec<u8>,
}

impl Connection<'_> {
    /// Sends the request, and reads the whole answer, which must be a 200.
    pub fn ask(&mut self) {
        self.answer.clear();
        self.stream.write_all(self.requests.head.as_bytes()).unwrap();
        let mut piece = [0; 4096];
        while !is_whole(&self.answer) {
            let n = self.stream.read(&mut piece).unwrap();
            assert!(n > 0, "the answer broke off: {}", String::from_utf8_lossy(&self.answer));
            self.answer.extend_from_slice(&piece[..n]);
        }
        assert!(self.answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&self.answer));
    }
}

/// Whether the end has been read of an answer that is the only one under way, and has no trailers.
fn is_whole(answer: &[u8]) -> bool {
    let Some(end) = answer.windows(4).position(|four| four == b"\r\n\r\n") else { return false };
    let head = String::from_utf8_lossy(&answer[..end]).to_ascii_lowercase();
    match head.split("content-length: ").nth(1).and_then(|rest| rest.split('\r').next()?.parse::<usize>().ok()) {
        Some(length) => answer.len() >= end + 4 + length,
        None => answer.ends_with(b"\r\n0\r\n\r\n"),
    }
}
