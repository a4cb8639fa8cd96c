//! A job that does as it is told while it runs, and one that talks to itself: what is done to it from outside can be
//! seen from inside.

use std::fs::{self, File};
use std::io::{self, BufRead, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::sys::{self, Forked};
use crate::{Result, burn, wrapped};

const MIB: usize = 1 << 20;

/// Reads orders, one a line, and tells at the end of its input what each came to.
pub(crate) fn obey() -> Result<Value> {
    let mut held: Vec<Vec<u8>> = Vec::new();
    let mut results = Vec::new();
    for line in io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split(' ').collect();
        results.push(match words[..] {
            // MiB of memory, kept
            ["allocate", mib] => {
                held.push(std::hint::black_box(vec![1; mib.parse::<usize>()? * MIB]));
                json!(held.iter().map(Vec::len).sum::<usize>() / MIB)
            }
            ["free"] => {
                held.clear();
                json!(0)
            }
            // children that wait to be killed with it: how many it got of so many
            ["fork", most] => json!(children(most.parse()?)),
            ["write", bytes] => {
                let mut out = io::stdout().lock();
                out.write_all(&vec![b'x'; bytes.parse()?])?;
                out.flush()?;
                json!(true)
            }
            ["burn", ms] => {
                burn(sys::cpu_time() + Duration::from_millis(ms.parse()?));
                json!(true)
            }
            _ => return Err(format!("no order `{line}`").into()),
        });
    }
    Ok(results.into())
}

fn children(most: usize) -> usize {
    for i in 0..most {
        match sys::fork() {
            Ok(Forked::Child) => {
                sys::close_streams();
                std::thread::sleep(Duration::from_secs(600));
                sys::exit_now(0)
            }
            Ok(Forked::Parent(_)) => {}
            Err(_) => return i,
        }
    }
    most
}

/// Two processes send numbers to and fro over a socket for a while, and one of them keeps each in a file. Tells how many
/// there were, whether each came once, in order and to the file, and the longest time that one was on its way.
pub(crate) fn converse(time: Duration) -> Result<Value> {
    let (mut here, mut there) = UnixStream::pair()?;
    let child = match sys::fork()? {
        Forked::Child => {
            drop(here);
            let mut number = [0; 8];
            while there.read_exact(&mut number).is_ok() && there.write_all(&number).is_ok() {}
            sys::exit_now(0)
        }
        Forked::Parent(child) => child,
    };
    drop(there);
    let path = std::env::temp_dir().join("conversation");
    let mut file = File::create(&path)?;
    let (start, mut rounds, mut longest, mut in_order) = (Instant::now(), 0_u64, Duration::ZERO, true);
    while start.elapsed() < time {
        let sent = Instant::now();
        here.write_all(&rounds.to_le_bytes())?;
        let mut back = [0; 8];
        here.read_exact(&mut back)?;
        in_order &= back == rounds.to_le_bytes();
        file.write_all(&back)?;
        longest = longest.max(sent.elapsed());
        rounds += 1;
        std::thread::sleep(Duration::from_millis(1));
    }
    drop(here);
    sys::wait_for(child)?;
    let kept = fs::read(&path)?;
    let expected: Vec<u8> = (0..rounds).flat_map(u64::to_le_bytes).collect();
    let longest = u64::try_from(longest.as_millis())?;
    Ok(json!({"rounds": rounds, "in_order": in_order, "kept": kept == expected, "longest_ms": longest}))
}

/// Waits as the parent of a `vfork` does, in a sleep that only the child's end or its own death ends, while the child
/// spins.
pub(crate) fn park_in_vfork(time: Duration) -> Result<()> {
    if wrapped::clone_and_park()? == 0 {
        wrapped::rename("child");
        crate::spin(time);
        sys::exit_now(0)
    }
    Ok(())
}
