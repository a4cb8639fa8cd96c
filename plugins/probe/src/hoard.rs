//! Holding kernel memory in every form that there is, and work for the kernel outside of one's own account.

use std::fs::{self, File};
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::sys::{self, Forked};
use crate::{Result, say, spin, wrapped};

const MIB: usize = 1 << 20;

/// Hoards one kind of memory in `most` steps of about a MiB, or until it is refused. Tells the steps and the refusal.
pub(crate) fn hoard(kind: &str, most: usize) -> Result<()> {
    let mut hoard = Hoard::default();
    for step in 0..most {
        if let Err(error) = hoard.add(kind, step) {
            hoard.clear();
            return say(&format!("{step} {error}"));
        }
    }
    hoard.clear();
    say(&format!("{most} not refused"))
}

#[derive(Default)]
struct Hoard {
    files: Vec<File>,
    pipes: Vec<(PipeReader, PipeWriter)>,
    sockets: Vec<(UnixDatagram, UnixDatagram)>,
    epolls: Vec<std::os::fd::OwnedFd>,
    directory: Option<PathBuf>,
}

impl Hoard {
    fn add(&mut self, kind: &str, step: usize) -> io::Result<()> {
        let full = vec![1_u8; MIB];
        match kind {
            "anonymous" | "shared" => {
                let flags = if kind == "shared" { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
                let memory = wrapped::map(MIB, flags)?;
                (0..MIB).step_by(4096).for_each(|at| memory.touch(at, 1));
            }
            // a page and its table for every 2 MiB that are mapped
            "page-tables" => {
                let memory = wrapped::map(256 * MIB, libc::MAP_PRIVATE | libc::MAP_NORESERVE)?;
                (0..256 * MIB).step_by(2 * MIB).for_each(|at| memory.touch(at, 1));
            }
            "mappings" => {
                let memory = wrapped::map(32 * MIB, libc::MAP_PRIVATE | libc::MAP_NORESERVE)?;
                (4096..32 * MIB - 8192).step_by(8192).try_for_each(|at| memory.split(at))?;
            }
            "tmp" => {
                let mut file = File::create(self.directory()?.join(step.to_string()))?;
                file.write_all(&full)?;
            }
            "inodes" => {
                for i in 0..512 {
                    fs::create_dir(self.directory()?.join(format!("{step}-{i}")))?;
                }
            }
            "memory-file" => {
                let mut file = File::from(wrapped::memory_file()?);
                file.write_all(&full)?;
                self.files.push(file);
            }
            "pipes" => {
                for _ in 0..16 {
                    let (from, mut to) = io::pipe()?;
                    let bytes = usize::try_from(wrapped::pipe_bytes(to.as_fd())?).map_err(io::Error::other)?;
                    to.write_all(&full[..bytes])?;
                    self.pipes.push((from, to));
                }
            }
            "sockets" => {
                let mut sent = 0;
                while sent < MIB {
                    let pair = UnixDatagram::pair()?;
                    pair.0.set_nonblocking(true)?;
                    while pair.0.send(&full[..32 * 1024]).is_ok() {
                        sent += 32 * 1024;
                    }
                    self.sockets.push(pair);
                }
            }
            // every descriptor watched by every instance
            "epoll" => {
                let epoll = wrapped::epoll()?;
                for (from, _) in &self.pipes {
                    wrapped::watch(epoll.as_fd(), from.as_fd())?;
                }
                while self.pipes.len() < 100 {
                    self.pipes.push(io::pipe()?);
                }
                self.epolls.push(epoll);
            }
            "timers" => (0..1024).try_for_each(|_| wrapped::timer())?,
            "descriptors-in-flight" => {
                let pair = UnixDatagram::pair()?;
                let file = File::open("/dev/null")?;
                for _ in 0..8 {
                    wrapped::send_fd(pair.0.as_fd(), file.as_fd())?;
                }
                self.sockets.push(pair);
            }
            other => return Err(io::Error::other(format!("no kind `{other}`"))),
        }
        Ok(())
    }

    fn directory(&mut self) -> io::Result<&PathBuf> {
        if self.directory.is_none() {
            let path = std::env::temp_dir().join(format!("probe-hoard-{}", std::process::id()));
            fs::create_dir(&path)?;
            self.directory = Some(path);
        }
        self.directory.as_ref().ok_or_else(|| io::Error::other("no directory"))
    }

    fn clear(&mut self) {
        if let Some(path) = self.directory.take() {
            let _ = fs::remove_dir_all(path);
        }
    }
}

/// How far each way goes to make one file large: written at its end, allocated, described by attributes.
pub(crate) fn large_files(bytes: usize) -> Result<()> {
    let path = std::env::temp_dir().join(format!("probe-large-{}", std::process::id()));
    let file = File::create_new(&path)?;
    let word = |result: io::Result<()>| result.map_or_else(|error| error.raw_os_error().unwrap_or(-1), |()| 0);
    let allocated = word(wrapped::fallocate(file.as_fd(), bytes));
    file.set_len(0)?;
    // a hole takes no place, however long it is
    let sparse = word(file.set_len(1 << 40));
    let described = word(wrapped::set_xattr(&path, "user.probe", &vec![1; 60_000]));
    let mut page = [1_u8; 4096];
    let read = word(File::open(&path)?.read_exact(&mut page));
    fs::remove_file(&path)?;
    say(&json!({"allocate": allocated, "sparse": sparse, "attribute": described, "read": read, "zero": page[0]})
        .to_string())
}

/// Has the kernel write out what is not the caller's, and asks for more than its share. The errno of each.
pub(crate) fn off_account() -> Result<()> {
    let word = |result: io::Result<()>| result.map_or_else(|error| error.raw_os_error().unwrap_or(-1), |()| 0);
    let path = std::env::temp_dir().join(format!("probe-sync-{}", std::process::id()));
    let file = File::create(&path)?;
    fs::remove_file(path)?; // it is open, and that is enough
    let told = json!({
        "sync": word(wrapped::sync()),
        "syncfs": word(wrapped::sync_of(file.as_fd())),
        "nice": word(wrapped::nice(-5)),
        "real_time": word(wrapped::real_time()),
    });
    say(&told.to_string())
}

/// Epoll instances that watch each other, as deep as the kernel lets them.
pub(crate) fn nest_epoll(most: usize) -> Result<()> {
    let mut chain = vec![wrapped::epoll()?];
    while chain.len() <= most {
        let next = wrapped::epoll()?;
        if let Err(error) = wrapped::watch(next.as_fd(), chain[chain.len() - 1].as_fd()) {
            return say(&format!("{} {error}", chain.len()));
        }
        chain.push(next);
    }
    say(&format!("{most} not refused"))
}

/// Children that end and are never waited for, until it is refused or has `most`. Tells the number.
pub(crate) fn zombies(most: usize) -> Result<()> {
    for made in 0..most {
        match sys::fork() {
            Ok(Forked::Child) => sys::exit_now(0),
            Ok(Forked::Parent(_)) => {}
            Err(error) => return say(&format!("{made} {error}")),
        }
    }
    say(&format!("{most} not refused"))
}

/// Grandchildren whose parent has gone, one after the other. Tells how many there were: an init that does not reap
/// them lets nobody get far.
pub(crate) fn orphans(most: usize) -> Result<()> {
    for made in 0..most {
        let deadline = Instant::now() + Duration::from_secs(2);
        loop {
            match sys::fork() {
                Ok(Forked::Child) => {
                    let _ = sys::fork();
                    sys::exit_now(0)
                }
                Ok(Forked::Parent(child)) => {
                    sys::wait_for(child)?;
                    break;
                }
                Err(error) if Instant::now() > deadline => return say(&format!("{made} {error}")),
                Err(_) => std::thread::yield_now(), // its place is free once it is reaped
            }
        }
    }
    say(&format!("{most} not refused"))
}

/// Uses CPU by children of a millisecond each, or by bursts between sleeps, until the wall time is over.
pub(crate) fn dodge(way: &str, time: Duration) -> Result<()> {
    let start = Instant::now();
    while start.elapsed() < time {
        match way {
            "children" => match sys::fork() {
                Ok(Forked::Child) => {
                    spin(Duration::from_millis(1));
                    sys::exit_now(0)
                }
                Ok(Forked::Parent(child)) => _ = sys::wait_for(child)?,
                Err(_) => {}
            },
            // shorter than a tick, and asleep when the tick comes
            "bursts" => {
                spin(Duration::from_micros(700));
                std::thread::sleep(Duration::from_micros(100));
            }
            "nice" => {
                let _ = wrapped::nice(19);
                spin(Duration::from_millis(1));
            }
            other => return Err(format!("no way `{other}`").into()),
        }
    }
    Ok(())
}

/// One line of zeros and ones without an end of so many MiB, or a byte now and then.
pub(crate) fn drip(bytes: usize, pause: Duration) -> Result<()> {
    let mut out = io::stdout().lock();
    for i in 0..bytes {
        out.write_all(&[u8::try_from(i % 256)?])?;
        out.flush()?;
        std::thread::sleep(pause);
    }
    Ok(())
}

/// Children that do everything not to be found: another session, another parent, deaf to every signal that can be
/// ignored, stopped, or forking on. Tells how many there are, and waits for the end of its input.
pub(crate) fn hide(time: Duration) -> Result<()> {
    const SUBREAPER: i32 = 36;
    let _ = wrapped::prctl(SUBREAPER, 1);
    let deaf = || (1..=64).filter(|signal| ![9, 19].contains(signal)).for_each(sys::ignore);
    let mut hidden = 0;
    for way in 0..6 {
        let child = match way {
            0 => wrapped::clone_sibling()? == 0,
            _ => loop {
                match sys::fork() {
                    Ok(forked) => break matches!(forked, Forked::Child),
                    // for a moment there can be too many that have ended and have not been reaped
                    Err(_) => std::thread::yield_now(),
                }
            },
        };
        hidden += 1;
        if !child {
            continue;
        }
        deaf();
        match way {
            1 => sys::leave_session(),
            // what waits in vfork cannot be stopped otherwise than by death
            2 => drop(std::process::Command::new("/proc/self/exe").args(["sleep", "60000"]).status()),
            3 => drop(sys::raise(libc::SIGSTOP)),
            4 => loop {
                // a new pid as often as it can
                match sys::fork() {
                    Ok(Forked::Child) => {}
                    Ok(Forked::Parent(_)) => sys::exit_now(0),
                    Err(_) => std::thread::yield_now(),
                }
            },
            _ => {}
        }
        spin(time);
        sys::exit_now(0)
    }
    deaf();
    say(&hidden.to_string())?;
    wrapped::rename("holding");
    io::copy(&mut io::stdin(), &mut io::sink())?;
    Ok(())
}
