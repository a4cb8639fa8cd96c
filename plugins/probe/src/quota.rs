//! What the kernel counts for a user, and what two processes can meet at: taken, held, and told.
//!
//! Who holds is named `holding` until its input ends, so that a test on the host can wait for it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use crate::wrapped;
use crate::{Result, say};

/// Takes one kind of thing until it is refused or has `most`, tells the number and the refusal, and holds it.
pub(crate) fn take(kind: &str, most: usize) -> Result<()> {
    match kind {
        "inotify" => take_each(most, |_| wrapped::inotify()),
        "keys" => take_each(most, wrapped::add_key),
        "signals" => take_each(most, |_| wrapped::queue_signal()),
        "timers" => take_each(most, |_| wrapped::timer()),
        "pipes" => take_each(most, |_| match io::pipe()? {
            // beyond its soft limit the kernel gives a user pipes of one or two pages
            (from, _) if wrapped::pipe_bytes(from.as_fd())? < 65_536 => Err(io::Error::other("a small pipe")),
            both => Ok(both),
        }),
        other => Err(format!("no kind `{other}`").into()),
    }
}

fn take_each<T>(most: usize, mut one: impl FnMut(usize) -> io::Result<T>) -> Result<()> {
    let mut held = Vec::new();
    let end = loop {
        if held.len() == most {
            break "not refused".to_owned();
        }
        match one(held.len()) {
            Ok(one) => held.push(one),
            Err(error) => break error.to_string(),
        }
    };
    say(&format!("{} {end}", held.len()))?;
    hold()
}

fn hold() -> Result<()> {
    wrapped::rename("holding");
    io::copy(&mut io::stdin(), &mut io::sink())?;
    Ok(())
}

fn errno<T>(result: &io::Result<T>) -> i32 {
    result.as_ref().err().map_or(0, |error| error.raw_os_error().unwrap_or(-1))
}

/// Locks every one of these files in every way, tells the errno of each, and holds them.
pub(crate) fn lock_all(paths: &[&str]) -> Result<()> {
    let mut held = Vec::new();
    let mut told = Map::new();
    for path in paths {
        let open = OpenOptions::new().read(true).write(true).open(path).or_else(|_| File::open(path));
        let Ok(file) = open else {
            told.insert((*path).to_owned(), json!("closed"));
            continue;
        };
        let errnos = [wrapped::flock(file.as_fd()), wrapped::record_lock(file.as_fd()), wrapped::lease(file.as_fd())];
        told.insert((*path).to_owned(), json!(errnos.map(|result| errno(&result))));
        held.push(file);
    }
    say(&Value::from(told).to_string())?;
    hold()
}

/// Listens on an abstract name.
pub(crate) fn listen(name: &str) -> Result<()> {
    let listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(name)?)?;
    say("listening")?;
    hold()?;
    drop(listener);
    Ok(())
}

/// The errno of connecting to an abstract name.
pub(crate) fn connect(name: &str) -> Result<()> {
    say(&errno(&UnixStream::connect_addr(&SocketAddr::from_abstract_name(name)?)).to_string())
}

/// Leaves something of this name in every place that there is, and tells the errno of each.
pub(crate) fn leave(name: &str, key: usize) -> Result<()> {
    const CREATE: usize = 0o3600;
    let mut told: Map<_, _> = places(name)
        .into_iter()
        .map(|path| (path.display().to_string(), json!(errno(&fs::write(&path, "left")))))
        .collect();
    for (kind, made) in wrapped::system_v(key, CREATE) {
        told.insert(kind.to_owned(), json!(errno(&made)));
    }
    told.insert("mqueue".to_owned(), json!(errno(&wrapped::message_queue(&format!("/{name}")))));
    say(&Value::from(told).to_string())
}

/// Where somebody could leave a file for the next one.
fn places(name: &str) -> Vec<PathBuf> {
    ["/tmp", "/dev/shm", "/var/tmp", "/run", "/dev/mqueue"].iter().map(|dir| PathBuf::from(dir).join(name)).collect()
}

/// What of [`leave`] is still there; it is taken away.
pub(crate) fn find(name: &str, key: usize) -> Result<()> {
    let mut found = Vec::new();
    for path in places(name) {
        if fs::remove_file(&path).is_ok() {
            found.push(path.display().to_string());
        }
    }
    for (kind, there) in wrapped::system_v(key, 0) {
        if let Ok(id) = there {
            wrapped::remove_system_v(kind, id);
            found.push(kind.to_owned());
        }
    }
    let queue = format!("/{name}");
    wrapped::remove_message_queue(&queue);
    found.sort();
    say(&Value::from(found).to_string())
}

/// Writes a pattern all over so many MiB, and tells how many copies there are.
pub(crate) fn mark(seed: u64, mib: usize) -> Result<()> {
    let pattern = pattern(seed);
    let memory = vec![pattern; (mib << 20) / size_of_val(&pattern)];
    std::hint::black_box(&memory);
    say(&memory.len().to_string())
}

/// The same, and then a child of the same process looks for it, as the next job of a server that forks would.
pub(crate) fn mark_and_search(seed: u64, mib: usize) -> Result<()> {
    let pattern = pattern(seed);
    let memory = std::hint::black_box(vec![pattern; (mib << 20) / size_of_val(&pattern)]);
    match crate::sys::fork()? {
        crate::sys::Forked::Child => {
            let _ = search(seed);
            crate::sys::exit_now(0)
        }
        crate::sys::Forked::Parent(child) => crate::sys::wait_for(child)?,
    };
    drop(memory);
    Ok(())
}

/// Eight words that no other program has.
fn pattern(seed: u64) -> [u64; 8] {
    let mut state = seed;
    [(); 8].map(|()| {
        // the step of splitmix64
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9)
    })
}

/// Counts the pages that hold a pattern in everything that this process can read of itself, and how many of 64 MiB of
/// new memory are not zero.
pub(crate) fn search(seed: u64) -> Result<()> {
    use std::os::unix::fs::FileExt;

    // what is looked for is itself in memory: told apart by being turned over
    let turned = std::hint::black_box(pattern(seed).map(|word| !word));
    let memory = File::open("/proc/self/mem")?;
    let (mut pages, mut copies, mut page) = (0_u64, 0_u64, [0_u8; 4096]);
    for line in fs::read_to_string("/proc/self/maps")?.lines() {
        let Some((from, to)) = line.split(' ').next().and_then(|range| range.split_once('-')) else { continue };
        let (from, to) = (u64::from_str_radix(from, 16)?, u64::from_str_radix(to, 16)?);
        if line.contains("[stack]") || line.contains("[v") {
            continue; // the page that is read into is on the stack
        }
        for at in (from..to).step_by(page.len()) {
            if memory.read_exact_at(&mut page, at).is_err() {
                break;
            }
            pages += 1;
            let holds = |at: usize| {
                turned.iter().enumerate().all(|(i, word)| {
                    let bytes = &page[at + 8 * i..at + 8 * i + 8];
                    bytes.iter().zip(word.to_le_bytes()).all(|(byte, turned)| *byte == !turned)
                })
            };
            copies += u64::from((0..=page.len() - 64).step_by(8).any(holds));
        }
    }
    let new = wrapped::map(64 << 20, libc::MAP_PRIVATE)?;
    say(&json!({"read": pages > 0, "found": copies > 0, "new_is_used": new.is_used()}).to_string())
}

/// Whether the kernel tells which pages are in memory, and merges equal ones.
pub(crate) fn sharing() -> Result<()> {
    let memory = wrapped::map(1 << 20, libc::MAP_PRIVATE)?;
    memory.touch(0, 1);
    const SET_MEMORY_MERGE: i32 = 67;
    let merge = memory.advise(libc::MADV_MERGEABLE);
    let mincore = memory.resident();
    let told = json!({
        "mincore": errno(&mincore),
        "madvise": errno(&merge),
        "prctl": errno(&wrapped::prctl(SET_MEMORY_MERGE, 1)),
    });
    say(&told.to_string())
}

/// Interrupts every CPU as often as it is let, with changes of mappings that other threads use and with barriers.
/// Tells the errno of the barrier that reaches all CPUs of the host.
pub(crate) fn storm(time: Duration) -> Result<()> {
    const GLOBAL: usize = 1;
    const PRIVATE: usize = 8;
    const REGISTER_PRIVATE: usize = 16;
    let global = errno(&wrapped::membarrier(GLOBAL));
    wrapped::membarrier(REGISTER_PRIVATE)?;
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut pages = vec![0_u8; 8 << 20];
                while start.elapsed() < time {
                    let _ = wrapped::membarrier(PRIVATE);
                    for at in (0..pages.len()).step_by(4096) {
                        pages[at] = pages[at].wrapping_add(1);
                    }
                    pages = std::hint::black_box(vec![0; pages.len()]);
                }
            });
        }
    });
    say(&global.to_string())
}

/// The least step that the clock of this process shows.
pub(crate) fn clock_step() -> Duration {
    let step = |_| {
        let start = Instant::now();
        let mut steps = std::iter::repeat_with(|| start.elapsed());
        steps.find(|step| !step.is_zero()).unwrap_or_default()
    };
    (0..1000).map(step).min().unwrap_or_default()
}

/// What of speculation past stores is on, as numbers and as the kernel's word.
pub(crate) fn speculation() -> Result<()> {
    let status = fs::read_to_string("/proc/self/status")?;
    let word = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        line.map(|word| word.trim().to_owned())
    };
    let (words, (get, set)) =
        ([word("Speculation_Store_Bypass"), word("SpeculationIndirectBranch")], wrapped::speculation());
    let told = json!({
        "store_bypass": words[0],
        "indirect_branch": words[1],
        "get": get.as_ref().ok(),
        "get_errno": errno(&get),
        "set_errno": errno(&set),
    });
    say(&told.to_string())
}
