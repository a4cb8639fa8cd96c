//! Taking more than there is: each until it is refused, or a little past what it was told to take.

use std::fs::{self, File};
use std::io::{self, Write};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::sys::{Forked, exit_now, fork, ignore, kill, leave_session, wait_for};
use crate::{Result, spin};

const MIB: usize = 1 << 20;

/// Recurses with frames of about 1 KiB. Tells how many there were.
pub(crate) fn use_stack(kib: u64) -> u64 {
    let mut frame = [1; 126];
    std::hint::black_box(&mut frame);
    if kib == 0 { 0 } else { use_stack(kib - 1) + frame[0] }
}

/// Runs `work` in a grandchild whose parent has gone, and waits for its end.
pub(crate) fn in_grandchild(work: impl FnOnce()) -> Result<()> {
    let (mut done, signal) = io::pipe()?;
    match fork()? {
        Forked::Child => {
            if let Ok(Forked::Child) = fork() {
                work();
                drop(signal);
            }
            exit_now(0)
        }
        Forked::Parent(child) => {
            wait_for(child)?;
            drop(signal);
            io::copy(&mut done, &mut io::sink())?; // ends when the grandchild does
            Ok(())
        }
    }
}

pub(crate) fn spin_threads(threads: usize, time: Duration) {
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let start = Instant::now();
                while start.elapsed() < time {
                    std::hint::spin_loop();
                }
            });
        }
    });
}

/// Touches so many MiB of memory, and tells how many it got.
pub(crate) fn allocate(mib: usize) -> usize {
    let mut held = Vec::new();
    for i in 0..mib {
        let mut chunk: Vec<u8> = Vec::new();
        if chunk.try_reserve_exact(MIB).is_err() {
            return i;
        }
        chunk.resize(MIB, 1);
        std::hint::black_box(&chunk);
        held.push(chunk);
    }
    held.len()
}

/// Takes memory and keeps it until the input ends.
pub(crate) fn allocate_and_wait(mib: usize) -> Result<()> {
    let held = std::hint::black_box(vec![1_u8; mib * MIB]);
    io::copy(&mut io::stdin(), &mut io::sink())?;
    drop(held);
    Ok(())
}

/// The same in a child; then goes on for a while, whatever became of the child. Tells how the child ended.
pub(crate) fn allocate_in_child(mib: usize) -> Result<i32> {
    match fork()? {
        Forked::Child => {
            allocate(mib);
            exit_now(0)
        }
        Forked::Parent(child) => {
            let end = wait_for(child)?;
            std::thread::sleep(Duration::from_secs(5));
            Ok(end)
        }
    }
}

/// Forks children that wait, until it is refused or has `most`. Tells how many processes there were, itself included.
pub(crate) fn fork_until_refused(most: usize) -> usize {
    let mut children = Vec::new();
    while children.len() < most {
        match fork() {
            Ok(Forked::Child) => linger(),
            Ok(Forked::Parent(child)) => children.push(child),
            Err(_) => break,
        }
    }
    for child in &children {
        kill(*child, libc::SIGKILL);
    }
    for child in &children {
        let _ = wait_for(*child);
    }
    children.len() + 1
}

/// Every process forks as fast as it can, `most` times each, and then waits for its end.
pub(crate) fn fork_bomb(most: usize) -> ! {
    for _ in 0..most {
        let _ = fork();
    }
    linger()
}

/// Waits to be killed, but not for ever.
fn linger() -> ! {
    std::thread::sleep(Duration::from_secs(30));
    exit_now(0)
}

/// Starts threads that wait, until it is refused or has `most`. Tells how many there were, the main one included.
pub(crate) fn threads_until_refused(most: usize) -> usize {
    let mut threads = 1;
    while threads <= most {
        let spawned = std::thread::Builder::new().stack_size(64 * 1024).spawn(|| {
            std::thread::sleep(Duration::from_secs(60));
        });
        if spawned.is_err() {
            break;
        }
        threads += 1;
    }
    threads
}

/// Opens files until it is refused or has `most`. Tells the number and the refusal.
pub(crate) fn open_until_refused(most: usize) -> Result<String> {
    let mut open = Vec::new();
    while open.len() < most {
        match File::open("/dev/null") {
            Ok(file) => open.push(file),
            Err(error) => return Ok(format!("{} {error}", open.len())),
        }
    }
    Ok(format!("{} not refused", open.len()))
}

/// Writes a file in `/tmp` until it is refused or has `bytes`. Tells the number and the refusal.
pub(crate) fn write_until_refused(bytes: usize) -> Result<String> {
    let path = std::env::temp_dir().join("probe-file");
    let mut file = File::create(&path)?;
    let mut written = 0;
    let end = loop {
        if written >= bytes {
            break "not refused".to_owned();
        }
        match file.write(&[7; 4096]) {
            Ok(0) => break "nothing written".to_owned(),
            Ok(n) => written += n,
            Err(error) => break error.to_string(),
        }
    };
    fs::remove_file(path)?;
    Ok(format!("{written} {end}"))
}

/// Writes one file in `/tmp` until that is refused, then makes empty ones until that is, keeps all until its input ends, and
/// tells how much it got and how it was refused. For a sandbox alone: there is no other end to it.
pub(crate) fn fill_tmp_and_wait() -> Result<Value> {
    let dir = std::env::temp_dir();
    let errno = |error: io::Error| error.raw_os_error().unwrap_or(0);
    let (mut bytes, mut files) = (0, 0);
    let mut file = File::create(dir.join("large"))?;
    let bytes_errno = loop {
        match file.write(&[7; 65_536]) {
            Ok(n) => bytes += n,
            Err(error) => break errno(error),
        }
    };
    let files_errno = loop {
        match File::create(dir.join(files.to_string())) {
            Ok(_) => files += 1,
            Err(error) => break errno(error),
        }
    };
    io::copy(&mut io::stdin(), &mut io::sink())?;
    Ok(json!({"bytes": bytes, "files": files, "bytes_errno": bytes_errno, "files_errno": files_errno}))
}

/// Makes files in `/tmp` until it is refused or has `most`. Tells the number and the refusal.
pub(crate) fn make_files_until_refused(most: usize) -> Result<String> {
    let dir = std::env::temp_dir().join(format!("probe-files-{}", std::process::id()));
    fs::create_dir(&dir)?;
    let mut made = 0;
    let end = loop {
        if made >= most {
            break "not refused".to_owned();
        }
        match File::create(dir.join(made.to_string())) {
            Ok(_) => made += 1,
            Err(error) => break error.to_string(),
        }
    };
    fs::remove_dir_all(dir)?;
    Ok(format!("{made} {end}"))
}

/// Writes so many MiB to `stdout` or `stderr`.
pub(crate) fn flood(stream: &str, mib: usize) -> Result<()> {
    let mut out: Box<dyn Write> = match stream {
        "stdout" => Box::new(io::stdout().lock()),
        "stderr" => Box::new(io::stderr().lock()),
        other => return Err(format!("no stream `{other}`").into()),
    };
    let chunk = vec![b'x'; MIB];
    for _ in 0..mib {
        out.write_all(&chunk)?;
    }
    Ok(out.flush()?)
}

/// Leaves children behind that are deaf to what ends daemons, and keep busy.
pub(crate) fn leave_behind(children: usize, time: Duration) -> Result<()> {
    for _ in 0..children {
        if let Forked::Child = fork()? {
            leave_session();
            [libc::SIGTERM, libc::SIGHUP, libc::SIGINT].into_iter().for_each(ignore);
            spin(time);
            exit_now(0)
        }
    }
    Ok(())
}

/// Leaves a grandchild behind that keeps standard output open, and ends at once.
pub(crate) fn hold_output(time: Duration) -> Result<()> {
    if let Forked::Child = fork()? {
        std::thread::sleep(time);
        let _ = writeln!(io::stdout(), "late");
        exit_now(0);
    }
    Ok(writeln!(io::stdout(), "early")?)
}
