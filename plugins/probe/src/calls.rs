//! Every system call that there could be, and random ones: which the kernel looks at, and which it never sees.

#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // arguments of system calls are 64 bits of anything

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::Result;
use crate::raw::{End, call, errno, in_child, shared, try_call};
use crate::sys::exit_now;

/// How long a call may take before it is called one that waits.
const PATIENCE: Duration = Duration::from_millis(60);

/// In a slot: nothing has answered yet.
const UNTOLD: i64 = i64::MIN;

/// Arguments that no call can do anything with, the least harmful first: outside of a sandbox that one alone is used.
fn patterns(number: usize) -> [[usize; 6]; 6] {
    let mut random = Random(number as u64 + 1);
    let any: [usize; 6] = std::array::from_fn(|_| random.word());
    let small: [usize; 6] = std::array::from_fn(|_| random.word() % 64);
    [[usize::MAX; 6], [0; 6], [1; 6], any, small, small.map(|word| word | 0xdead_beef << 32)]
}

/// For each number from `first` up to `end` its answers to the first `count` patterns: an errno, 0 for success,
/// `blocked`, or `signal N` of a caller that did not live to tell. Those in `spared` are not made.
pub(crate) fn sweep(first: usize, end: usize, count: usize, spared: &[usize]) -> Result<Value> {
    let mut answers = Map::new();
    for number in (first..end).filter(|number| !spared.contains(number)) {
        answers.insert(number.to_string(), answers_of(number, count)?);
    }
    Ok(answers.into())
}

/// Calls that return twice.
const FORKING: [i64; 3] = [libc::SYS_clone, libc::SYS_fork, libc::SYS_vfork];

fn answers_of(number: usize, count: usize) -> Result<Value> {
    let patterns = &patterns(number)[..count];
    let told = shared_slots(count)?;
    let mut answers = Vec::new();
    while answers.len() < count {
        // one child for all, and another one for what the first did not live to try
        let end = in_child(PATIENCE, || {
            for (slot, args) in told.iter().zip(patterns).skip(answers.len()) {
                let answer = call(number, *args);
                if answer == 0 && FORKING.map(i64::cast_unsigned).contains(&(number as u64)) {
                    // a child of the call's: its parent tells, and may be at the next number by now
                    exit_now(0)
                }
                slot.store(errno(answer), SeqCst);
            }
        })?;
        while answers.len() < count && told[answers.len()].load(SeqCst) != UNTOLD {
            answers.push(json!(told[answers.len()].load(SeqCst)));
        }
        if answers.len() < count {
            answers.push(match end {
                End::Exited => json!("ended"),
                End::Signaled(signal) => json!(format!("signal {signal}")),
                End::Blocked => json!("blocked"),
            });
        }
    }
    Ok(answers.into())
}

/// The same slots for every number: a mapping for each would be too many.
fn shared_slots(count: usize) -> Result<&'static [std::sync::atomic::AtomicI64]> {
    static SLOTS: std::sync::OnceLock<&[std::sync::atomic::AtomicI64]> = std::sync::OnceLock::new();
    let slots = match SLOTS.get() {
        Some(slots) => slots,
        None => SLOTS.get_or_init(|| shared(16).unwrap_or(&[])),
    };
    let slots = slots.get(..count).ok_or("no shared memory")?;
    slots.iter().for_each(|slot| slot.store(UNTOLD, SeqCst));
    Ok(slots)
}

/// Calls of one number that differ in argument `at`, each in a child: the answers by that argument.
pub(crate) fn vary(number: &str, at: &str, args: &str, values: &[&str]) -> Result<Value> {
    let mut args: Vec<usize> = args.split(',').map(parse).collect::<Result<_>>()?;
    args.resize(6, 0);
    let (number, at) = (parse(number)?, parse(at)?);
    let mut answers = Map::new();
    let told = shared_slots(1)?;
    for value in values {
        args[at] = parse(value)?;
        told[0].store(-1, SeqCst);
        in_child(PATIENCE, || {
            let answer = call(number, std::array::from_fn(|i| args[i]));
            told[0].store(errno(answer), SeqCst);
        })?;
        answers.insert((*value).to_owned(), json!(told[0].load(SeqCst)));
    }
    Ok(answers.into())
}

fn parse(word: &str) -> Result<usize> {
    Ok(match word.strip_prefix("0x") {
        Some(hex) => usize::from_str_radix(hex, 16)?,
        None => word.parse()?,
    })
}

/// The `ioctl` requests of 16 bits, each with and without garbage above its 32nd, that a device or standard input
/// (`-`) knows: that answer anything but ENOTTY, or Landlock's EACCES, to an argument that is no address.
pub(crate) fn known_requests(path: &str) -> Result<Value> {
    // beyond 16 bits: of random devices, of KVM, and two whose low half is a harmless one's
    const MORE: [usize; 6] = [0x4004_5201, 0x4008_5203, 0x8004_5200, 0x4004_667f, 0x0001_541b, 0xae01_5401];
    let file = if path == "-" { None } else { Some(File::open(path)?) };
    let fd = file.as_ref().map_or(0, |file| file.as_raw_fd().cast_unsigned() as usize);
    let refusals = [libc::ENOTTY, libc::EACCES].map(i64::from);
    let known = |request: &usize| !refusals.contains(&errno(try_call(libc::SYS_ioctl, [fd, *request, 0])));
    let requests = (0..=0xffff).chain(MORE).flat_map(|low| [low, low | 0x5412 << 32, low | 0xffff_ffff << 32]);
    Ok(requests.filter(known).map(|request| format!("{request:#x}")).collect())
}

/// Makes so many random calls, the same ones for the same seed, in child after child. Tells how many calls were made
/// and how the children ended.
pub(crate) fn fuzz(calls: i64, seed: u64) -> Result<Value> {
    // these end or stop the caller by design, or all that there is, and would spend the other calls' turns
    const SPARED: [libc::c_long; 11] = [
        libc::SYS_exit,
        libc::SYS_exit_group,
        libc::SYS_pause,
        libc::SYS_rt_sigsuspend,
        libc::SYS_rt_sigreturn,
        libc::SYS_kill,
        libc::SYS_tkill,
        libc::SYS_tgkill,
        libc::SYS_rt_sigqueueinfo,
        libc::SYS_rt_tgsigqueueinfo,
        libc::SYS_pidfd_send_signal,
    ];
    let made = &shared(1)?[0];
    let buffer = vec![0_u8; 1 << 16];
    let mut ends: BTreeMap<String, u32> = BTreeMap::new();
    let mut children = 0;
    while made.load(SeqCst) < calls {
        children += 1;
        let end = in_child(4 * PATIENCE, || {
            let mut random = Random(seed.wrapping_mul(0x9e37_79b9).wrapping_add(children));
            crate::sys::close_streams(); // what it says is not the job's output
            for _ in 0..200 {
                let number = random.word() % 480;
                if SPARED.iter().any(|spared| spared.cast_unsigned() as usize == number) {
                    continue;
                }
                let args = std::array::from_fn(|_| random.argument(buffer.as_ptr() as usize));
                if made.fetch_add(1, SeqCst) < calls {
                    call(number, args);
                }
            }
        })?;
        let word = match end {
            End::Exited => "lived".to_owned(),
            End::Signaled(signal) => format!("signal {signal}"),
            End::Blocked => "blocked".to_owned(),
        };
        *ends.entry(word).or_default() += 1;
    }
    Ok(json!({"made": made.load(SeqCst).min(calls), "ends": ends}))
}

/// Xorshift: all that is asked of it is to be the same every time.
struct Random(u64);

impl Random {
    fn word(&mut self) -> usize {
        for shift in [13_i32, -7, 17] {
            self.0 ^= if shift > 0 { self.0 << shift } else { self.0 >> -shift };
        }
        self.0 as usize
    }

    /// What an argument could be: a small number, a descriptor, flags, an address in `buffer` or anywhere.
    fn argument(&mut self, buffer: usize) -> usize {
        match self.word() % 6 {
            0 => self.word() % 16,
            1 => 1 << (self.word() % 64),
            2 => buffer + self.word() % (1 << 15),
            3 => usize::MAX - self.word() % 128,
            4 => self.word() % 4096,
            _ => self.word(),
        }
    }
}
