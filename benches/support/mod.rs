//! What the benches share: the raw floor, programs that do nothing, and a table of what was measured.

#![allow(dead_code, unreachable_pub)] // each bench uses its own part of it
#![allow(clippy::unwrap_used, clippy::print_stdout)] // a bench that cannot go on says where, and prints its table

use std::time::{Duration, Instant};

/// Rounds of an interleaved measurement. `HOLM_BENCH_ROUNDS` changes it.
pub fn rounds() -> usize {
    std::env::var("HOLM_BENCH_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(200)
}

/// One of the things that are measured against each other.
pub struct Side<'a> {
    pub name: &'static str,
    pub run: Box<dyn FnMut() + 'a>,
}

/// The times of one side.
pub struct Times {
    pub name: &'static str,
    times: Vec<Duration>,
}

impl Times {
    pub fn at(&self, part: f64) -> Duration {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // a part of a length
        let index = ((self.times.len() as f64 * part) as usize).min(self.times.len() - 1);
        self.times[index]
    }
}

/// Runs all sides in turn, A B C A B C, so that whatever the machine does meanwhile happens to all of them.
pub fn interleave(sides: Vec<Side<'_>>) -> Vec<Times> {
    let mut sides = sides;
    let mut times: Vec<Times> = sides.iter().map(|side| Times { name: side.name, times: Vec::new() }).collect();
    for round in 0..rounds() + 5 {
        for (side, times) in sides.iter_mut().zip(&mut times) {
            let begun = Instant::now();
            (side.run)();
            // the first rounds fault pages in and make directories
            if round >= 5 {
                times.times.push(begun.elapsed());
            }
        }
    }
    times.iter_mut().for_each(|side| side.times.sort_unstable());
    times
}

/// Prints medians, 99th percentiles, and ratios to the first row's.
pub fn print_table(title: &str, rows: &[Times]) {
    println!("\n{title} ({} rounds, interleaved)\n", rounds());
    println!("| | p50 µs | p99 µs | p50 ÷ floor | p99 ÷ floor |\n|---|---:|---:|---:|---:|");
    let floor = &rows[0];
    for row in rows {
        let (p50, p99) = (row.at(0.5).as_secs_f64(), row.at(0.99).as_secs_f64());
        let ratio = |value: f64, part: f64| value / floor.at(part).as_secs_f64();
        println!(
            "| {} | {:.0} | {:.0} | {:.2} | {:.2} |",
            row.name,
            p50 * 1e6,
            p99 * 1e6,
            ratio(p50, 0.5),
            ratio(p99, 0.99)
        );
    }
}

/// The raw floor: `clone3` into seven namespaces, exit, wait. No cgroup, no root, no filter, no exec.
pub fn clone_exit_wait() {
    let flags = libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNS
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWCGROUP;
    // SAFETY: `clone_args` is a struct of integers for which all-zero is the documented default.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = u64::from(flags.cast_unsigned());
    args.exit_signal = libc::SIGCHLD as u64;
    // SAFETY: no memory is shared with the child, which does nothing but end; this process has one thread.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<libc::clone_args>()) };
    assert!(pid >= 0, "{}", std::io::Error::last_os_error());
    if pid == 0 {
        // SAFETY: ends the child without touching anything.
        unsafe { libc::_exit(0) };
    }
    // SAFETY: a null status is allowed; the pid is our child's.
    let waited = unsafe { libc::waitpid(libc::pid_t::try_from(pid).unwrap_or(-1), std::ptr::null_mut(), 0) };
    assert_eq!(i64::from(waited), pid);
}

/// The smallest program that ends at once: an ELF header, one segment, and `exit(0)`.
pub fn empty_program() -> Vec<u8> {
    let code = [0xb8, 60, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05]; // mov eax, 60; xor edi, edi; syscall
    let (base, headers) = (0x40_0000_u64, 64 + 56_u64);
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]); // an executable, for x86-64
    for word in [base + headers, 64, 0] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 1, 64, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]); // a loadable segment, readable and executable
    let size = headers + code.len() as u64;
    for word in [0, base, base, size, size, 0x1000] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(code);
    elf
}

/// The same as WebAssembly.
pub const EMPTY_MODULE: &str = r#"(module (memory (export "memory") 1) (func (export "_start")))"#;
