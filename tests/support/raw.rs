//! HTTP by hand, for what no HTTP client would send: broken framing, half a request, silence.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};

use ureq::http::{HeaderMap, HeaderName, HeaderValue};

use super::slowness::at_most;
use super::{Answer, OPERATOR, PATIENCE, Server};

/// The longest answer that is read by hand.
const MOST: usize = 64 << 20;

/// One connection, with nothing between the test and its bytes.
pub struct Raw {
    stream: TcpStream,
    /// What was read beyond the last answer.
    rest: Vec<u8>,
}

impl Raw {
    pub fn connect(server: &Server) -> Self {
        let stream = TcpStream::connect(server.address()).unwrap();
        stream.set_read_timeout(Some(at_most(2 * PATIENCE))).unwrap();
        stream.set_write_timeout(Some(at_most(2 * PATIENCE))).unwrap();
        stream.set_nodelay(true).unwrap();
        Self { stream, rest: Vec::new() }
    }

    /// Connects and sends the head of a request with the operator's key. What follows it is its body.
    pub fn request(server: &Server, line: &str, headers: &[&str]) -> Self {
        let mut raw = Self::connect(server);
        raw.head(line, headers);
        raw
    }

    /// Sends the head of a request with the operator's key.
    pub fn head(&mut self, line: &str, headers: &[&str]) {
        self.send(head(line, headers).as_bytes());
    }

    /// The same connection once more, to send from another thread.
    pub fn twin(&self) -> Self {
        Self { stream: self.stream.try_clone().unwrap(), rest: Vec::new() }
    }

    /// Sends bytes that the server must take.
    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// Sends bytes that the server may refuse by closing the connection. Tells whether it took them.
    pub fn offer(&mut self, bytes: &[u8]) -> bool {
        self.stream.write_all(bytes).is_ok()
    }

    /// Offers one chunk of a chunked body; an empty one ends it.
    pub fn chunk(&mut self, bytes: &[u8]) -> bool {
        let mut chunk = format!("{:x}\r\n", bytes.len()).into_bytes();
        chunk.extend_from_slice(bytes);
        chunk.extend_from_slice(b"\r\n");
        self.offer(&chunk)
    }

    /// Sends no more. The server sees the end of the stream, but can still answer. It may have closed its own end before.
    pub fn finish(&self) {
        match self.stream.shutdown(Shutdown::Write) {
            Err(error) if error.kind() != ErrorKind::NotConnected => panic!("{error}"),
            _ => {}
        }
    }

    /// Reads one answer; `None` if the connection ends without one.
    pub fn answer(&mut self) -> Option<Answer> {
        let mut answer = self.head_of_answer()?;
        answer.body = self.body(answer.status, &answer.headers);
        Some(answer)
    }

    /// Reads one answer without its body.
    pub fn head_of_answer(&mut self) -> Option<Answer> {
        let end = loop {
            if let Some(end) = find(&self.rest, b"\r\n\r\n") {
                break end + 4;
            }
            if !self.read_more() {
                assert!(self.rest.is_empty(), "half an answer: {:?}", String::from_utf8_lossy(&self.rest));
                return None;
            }
        };
        let head: Vec<u8> = self.rest.drain(..end).collect();
        let (status, headers) = parse_head(std::str::from_utf8(&head).unwrap());
        Some(Answer { status, headers, body: Vec::new() })
    }

    /// Reads the next chunk of a chunked body: the empty one at its end, `None` if the connection ends before that.
    pub fn piece(&mut self) -> Option<Vec<u8>> {
        let (size, start) = loop {
            if let Some(end) = find(&self.rest, b"\r\n") {
                let size = std::str::from_utf8(&self.rest[..end]).unwrap();
                break (usize::from_str_radix(size, 16).unwrap(), end + 2);
            }
            if !self.read_more() {
                return None;
            }
        };
        while self.rest.len() < start + size + 2 {
            if !self.read_more() {
                return None;
            }
        }
        let chunk: Vec<u8> = self.rest.drain(..start + size + 2).skip(start).collect();
        Some(chunk.strip_suffix(b"\r\n").expect("a chunk ends its line").to_vec())
    }

    /// Reads a chunked body. Tells whether it came to its end, and what came of it.
    pub fn pieces(&mut self) -> (bool, Vec<u8>) {
        let mut body = Vec::new();
        while let Some(chunk) = self.piece() {
            if chunk.is_empty() {
                return (true, body);
            }
            body.extend(chunk);
        }
        (false, body)
    }

    /// The answer, which must come.
    #[track_caller]
    pub fn answered(&mut self) -> Answer {
        self.answer().expect("the connection ended without an answer")
    }

    fn body(&mut self, status: u16, headers: &HeaderMap) -> Vec<u8> {
        if status < 200 || status == 204 {
            return Vec::new();
        }
        if headers.get("transfer-encoding").is_some_and(|value| value == "chunked") {
            return self.chunked_body();
        }
        match headers.get("content-length") {
            Some(length) => self.take(length.to_str().unwrap().parse().unwrap()),
            None => self.to_the_end(),
        }
    }

    fn chunked_body(&mut self) -> Vec<u8> {
        let (whole, body) = self.pieces();
        assert!(whole, "the answer breaks off after {} bytes", body.len());
        body
    }

    fn take(&mut self, length: usize) -> Vec<u8> {
        while self.rest.len() < length {
            assert!(self.read_more(), "the answer breaks off at {} of {length} bytes", self.rest.len());
        }
        self.rest.drain(..length).collect()
    }

    /// Everything that comes until the server closes the connection.
    #[allow(clippy::wrong_self_convention)] // it converts nothing: it reads to the end
    pub fn to_the_end(&mut self) -> Vec<u8> {
        while self.read_more() {}
        std::mem::take(&mut self.rest)
    }

    /// Whether the server has closed its side, or does so while nothing is sent to it any more.
    pub fn is_closed(&mut self) -> bool {
        self.stream.set_nonblocking(true).unwrap();
        let more = self.stream.read(&mut [0; 1]);
        self.stream.set_nonblocking(false).unwrap();
        match more {
            Ok(n) => n == 0,
            Err(error) => error.kind() != ErrorKind::WouldBlock,
        }
    }

    /// Reads until the connection ends. Tells whether it was torn down and not closed.
    pub fn is_reset(&mut self) -> bool {
        let mut rest = Vec::new();
        let end = self.stream.read_to_end(&mut rest);
        end.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset)
    }

    /// This end of the connection.
    pub fn local(&self) -> SocketAddr {
        self.stream.local_addr().unwrap()
    }

    /// False at the end of the stream, however that came.
    fn read_more(&mut self) -> bool {
        let mut buffer = [0; 64 * 1024];
        match self.stream.read(&mut buffer) {
            Ok(0) => false,
            Ok(n) => {
                self.rest.extend_from_slice(&buffer[..n]);
                assert!(self.rest.len() < MOST, "the answer never ends");
                true
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => true,
            // a server that closes with unread bytes before it resets the connection
            Err(error) if matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => false,
            Err(error) => panic!("no answer in time: {error}"),
        }
    }
}

/// The head of a request with the operator's key.
pub fn head(line: &str, headers: &[&str]) -> String {
    let mut head = format!("{line} HTTP/1.1\r\nHost: holm\r\nAuthorization: Bearer {OPERATOR}\r\n");
    for header in headers {
        head.push_str(header);
        head.push_str("\r\n");
    }
    head.push_str("\r\n");
    head
}

fn find(bytes: &[u8], needle: &[u8]) -> Option<usize> {
    bytes.windows(needle.len()).position(|window| window == needle)
}

fn parse_head(head: &str) -> (u16, HeaderMap) {
    let mut lines = head.split("\r\n");
    let status = lines.next().and_then(|line| line.strip_prefix("HTTP/1.")?.get(2..5)?.parse().ok());
    let fields = lines.filter_map(|line| line.split_once(':'));
    let header = |(name, value): (&str, &str)| {
        let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
        (name, HeaderValue::from_str(value.trim()).unwrap())
    };
    (status.unwrap_or_else(|| panic!("no status line: {head}")), fields.map(header).collect())
}

/// The content type and body of a `multipart/form-data` upload with these parts.
pub fn multipart(parts: &[(&str, &[u8])]) -> (String, Vec<u8>) {
    let mut body = Vec::new();
    for (name, content) in parts {
        body.extend(format!("--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n").bytes());
        body.extend_from_slice(content);
        body.extend_from_slice(b"\r\n");
    }
    body.extend(format!("--{BOUNDARY}--\r\n").bytes());
    (format!("multipart/form-data; boundary={BOUNDARY}"), body)
}

/// What stands between the parts of [`multipart`].
pub const BOUNDARY: &str = "holm-tests-boundary";
