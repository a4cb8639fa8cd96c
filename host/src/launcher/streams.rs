//! A job's standard streams: pipes, and what is kept of what comes out of them.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::{Bytes, BytesMut};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;

/// The most of an output that is held in memory. More goes to a file without a name in the data directory.
const IN_MEMORY: usize = 256 * 1024;

/// Bytes read at once: a few at first, as most streams carry, then what a pipe holds by default.
const FIRST_READ: usize = 4 * 1024;
const READ: usize = 64 * 1024;

/// The server's ends of a job's streams, and the job's own, to be sent to it.
#[derive(Debug)]
pub struct Stdio {
    /// To write the input to.
    pub stdin: pipe::Sender,
    /// To read standard output from.
    pub stdout: pipe::Receiver,
    /// To read standard error from.
    pub stderr: pipe::Receiver,
    /// Standard input, output and error of the job.
    pub theirs: [OwnedFd; 3],
}

impl Stdio {
    /// Makes three pipes. The job's ends block, as programs expect; ours do not.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn make() -> io::Result<Self> {
        let (stdin, to_stdin) = io::pipe()?;
        let (from_stdout, stdout) = io::pipe()?;
        let (from_stderr, stderr) = io::pipe()?;
        Ok(Self {
            // what is checked otherwise is known: they are pipes, just made
            stdin: pipe::Sender::from_owned_fd_unchecked(non_blocking(to_stdin.into())?)?,
            stdout: pipe::Receiver::from_owned_fd_unchecked(non_blocking(from_stdout.into())?)?,
            stderr: pipe::Receiver::from_owned_fd_unchecked(non_blocking(from_stderr.into())?)?,
            theirs: [stdin.into(), stdout.into(), stderr.into()],
        })
    }
}

fn non_blocking(fd: OwnedFd) -> io::Result<OwnedFd> {
    fcntl(fd.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok(fd)
}

/// What has come of a stream, and how much may come. Both may change while it flows.
#[derive(Debug)]
pub struct Flow {
    bytes: AtomicU64,
    limit: AtomicU64,
}

impl Flow {
    /// Nothing yet of so many bytes.
    #[must_use]
    pub fn new(limit: u64) -> Self {
        Self { bytes: AtomicU64::new(0), limit: AtomicU64::new(limit) }
    }

    /// So many more have come. Gives how many that makes, and how many there may be.
    pub fn count(&self, bytes: usize) -> (u64, u64) {
        let bytes = bytes as u64;
        // one order for all: whoever lowers the limit meanwhile sees what has come, or is seen here
        let all = self.bytes.fetch_add(bytes, Ordering::SeqCst) + bytes;
        (all, self.limit.load(Ordering::SeqCst))
    }

    /// How many have come.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::SeqCst)
    }

    /// How many may come from now on, those that have come counted. False if more have.
    #[must_use]
    pub fn limit_to(&self, limit: u64) -> bool {
        self.limit.store(limit, Ordering::SeqCst);
        self.bytes() <= limit
    }
}

/// Our own end of a stream failed.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The pipe.
    #[error("read the job's output")]
    Read(#[source] io::Error),
    /// The file that the output is kept in: the disk is full, for one.
    #[error("keep the job's output")]
    Keep(#[source] io::Error),
}

/// Reads one output stream to its end, keeping it up to a limit.
#[derive(Debug)]
pub struct Collector {
    flow: Arc<Flow>,
    keep: Keep,
}

#[derive(Debug)]
enum Keep {
    /// Everything, in memory or in a file in this directory.
    All(PathBuf),
    /// The last so many bytes.
    Tail(usize),
}

/// What came out of a stream.
#[derive(Debug)]
pub struct Collected {
    /// How many bytes came, the ones beyond the limit included as far as they were read.
    pub bytes: u64,
    /// What was kept.
    pub content: Content,
}

/// Kept output.
#[derive(Debug)]
pub enum Content {
    /// A small one.
    Memory(Bytes),
    /// A large one: a file that has no name and is gone when it is closed.
    File(File),
}

impl Collector {
    /// Keeps everything up to the flow's limit; large outputs in unnamed files in `dir`.
    #[must_use]
    pub fn everything(flow: Arc<Flow>, dir: &Path) -> Self {
        Self { flow, keep: Keep::All(dir.to_owned()) }
    }

    /// Keeps the last `bytes`.
    #[must_use]
    pub fn tail(flow: Arc<Flow>, bytes: usize) -> Self {
        Self { flow, keep: Keep::Tail(bytes) }
    }

    /// Reads `stream` to its end. Calls `over` with the limit once more than that has come; what comes after is thrown
    /// away, so that whoever still writes is not kept waiting.
    ///
    /// # Errors
    /// See [`StreamError`].
    pub async fn collect(self, mut stream: pipe::Receiver, over: impl FnOnce(u64)) -> Result<Collected, StreamError> {
        let mut over = Some(over);
        let mut kept = BytesMut::new();
        let mut file: Option<tokio::fs::File> = None;
        let mut buffer = BytesMut::with_capacity(FIRST_READ);
        loop {
            buffer.clear();
            let n = stream.read_buf(&mut buffer).await.map_err(StreamError::Read)?;
            if n == 0 {
                break;
            }
            buffer.reserve(if n == FIRST_READ { READ } else { 0 });
            let (bytes, limit) = self.flow.count(n);
            if over.is_none() {
                continue; // also should the limit be raised now: there would be a gap
            }
            if bytes > limit {
                over.take().into_iter().for_each(|over| over(limit));
                let surplus = usize::try_from(bytes - limit).unwrap_or(usize::MAX);
                buffer.truncate(n.saturating_sub(surplus));
            }
            match (&self.keep, &mut file) {
                (Keep::Tail(most), _) => keep_tail(&mut kept, &buffer, *most),
                (Keep::All(_), Some(file)) => file.write_all(&buffer).await.map_err(StreamError::Keep)?,
                (Keep::All(_), None) if kept.len() + buffer.len() <= IN_MEMORY => kept.extend_from_slice(&buffer),
                (Keep::All(dir), None) => {
                    let mut spool = unnamed_file(dir.clone()).await.map_err(StreamError::Keep)?;
                    spool.write_all(&kept).await.map_err(StreamError::Keep)?;
                    spool.write_all(&buffer).await.map_err(StreamError::Keep)?;
                    kept = BytesMut::new();
                    file = Some(spool);
                }
            }
        }
        let content = match file {
            None => Content::Memory(kept.freeze()),
            Some(mut file) => {
                file.flush().await.map_err(StreamError::Keep)?;
                Content::File(file.into_std().await)
            }
        };
        Ok(Collected { bytes: self.flow.bytes(), content })
    }
}

fn keep_tail(kept: &mut BytesMut, new: &[u8], most: usize) {
    kept.extend_from_slice(&new[new.len().saturating_sub(most)..]);
    let surplus = kept.len().saturating_sub(most);
    drop(kept.split_to(surplus));
}

async fn unnamed_file(dir: PathBuf) -> io::Result<tokio::fs::File> {
    let make = move || {
        use std::os::unix::fs::OpenOptionsExt;
        let flags = OFlag::O_TMPFILE | OFlag::O_EXCL;
        std::fs::OpenOptions::new().read(true).write(true).mode(0o600).custom_flags(flags.bits()).open(dir)
    };
    let file = tokio::task::spawn_blocking(make).await.map_err(io::Error::other)??;
    Ok(tokio::fs::File::from_std(file))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn collect(collector: Collector, chunks: Vec<Vec<u8>>) -> (Collected, bool) {
        let Stdio { stdout, theirs: [_, writer, _], .. } = Stdio::make().unwrap();
        let writer = std::thread::spawn(move || {
            use std::io::Write;
            let mut writer = File::from(writer);
            chunks.iter().for_each(|chunk| writer.write_all(chunk).unwrap());
        });
        let mut over = false;
        let collected = collector.collect(stdout, |_| over = true).await.unwrap();
        writer.join().unwrap();
        (collected, over)
    }

    fn flow(limit: u64) -> Arc<Flow> {
        Arc::new(Flow::new(limit))
    }

    #[test]
    fn a_flow_tells_whoever_lowers_its_limit_too_far() {
        let flow = Flow::new(10);
        assert_eq!(flow.count(8), (8, 10));
        assert!(flow.limit_to(8) && !flow.limit_to(7));
        assert_eq!((flow.count(1), flow.bytes()), ((9, 7), 9));
    }

    fn content(collected: Collected) -> Vec<u8> {
        use std::io::{Read, Seek};
        match collected.content {
            Content::Memory(bytes) => bytes.to_vec(),
            Content::File(mut file) => {
                let mut all = Vec::new();
                file.rewind().unwrap();
                file.read_to_end(&mut all).unwrap();
                all
            }
        }
    }

    #[tokio::test]
    async fn small_output_stays_in_memory_and_large_goes_to_a_file() {
        let dir = tempfile::tempdir().unwrap();
        for size in [0, 10, IN_MEMORY, IN_MEMORY + 1, 3_000_000] {
            let data: Vec<u8> = (0..=250_u8).cycle().take(size).collect();
            let (collected, over) =
                collect(Collector::everything(flow(4_000_000), dir.path()), vec![data.clone()]).await;
            assert!(!over && collected.bytes == size as u64);
            assert_eq!(matches!(collected.content, Content::Memory(_)), size <= IN_MEMORY, "{size}");
            assert!(content(collected) == data, "{size}");
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "the files have no names");
    }

    #[tokio::test]
    async fn exactly_the_limit_passes_and_one_more_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let (collected, over) = collect(Collector::everything(flow(1000), dir.path()), vec![vec![7; 1000]]).await;
        assert!(!over && collected.bytes == 1000);
        let (collected, over) = collect(Collector::everything(flow(1000), dir.path()), vec![vec![7; 1001]]).await;
        assert!(over && collected.bytes == 1001);
        assert_eq!(content(collected).len(), 1000);
    }

    #[tokio::test]
    async fn a_tail_is_the_last_bytes() {
        let chunks = vec![b"hello ".to_vec(), b"wor".to_vec(), b"ld".to_vec()];
        let (collected, over) = collect(Collector::tail(flow(100), 5), chunks).await;
        assert!(!over && collected.bytes == 11);
        assert_eq!(content(collected), b"world");
    }
}
