//! The program's own code and constants in huge pages.
//!
//! A clone has no page of the program's file mapped before it touches it, and a fault maps 64 KiB of an ordinary file: a
//! WebAssembly job takes some sixty of them, 2 µs each, and as many mappings go again at its end. Of a huge page a fault
//! maps 2 MiB at once.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use super::check;
use super::mount::{MountAttr, new_mount, restrict};
use super::process::{SingleThreaded, errno_of};

/// Of x86-64.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// A part of this process's memory that is mapped from a file and cannot be written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    start: usize,
    bytes: usize,
    executable: bool,
}

/// Puts copies in huge pages in the place of what the program's file is mapped to, as far as that is not written to and
/// fills such pages. They are on a read-only file system of their own, of which nobody has a descriptor afterwards.
///
/// # Errors
/// Those of making it, for instance `EINVAL` where the kernel has no huge pages. Nothing is changed then.
pub(crate) fn move_to_huge_pages(_proof: &SingleThreaded) -> nix::Result<()> {
    let maps = fs::read_to_string("/proc/self/maps").map_err(|error| errno_of(&error))?;
    let parts = parts_around(&maps, move_to_huge_pages as *const () as usize);
    let attr = MountAttr::NOSUID | MountAttr::NODEV;
    let pages = new_mount(c"tmpfs", &[(c"huge", c"always"), (c"nr_inodes", c"16"), (c"mode", c"0700")], attr)?;
    let open =
        |number: usize, flags| openat(&pages, number.to_string().as_str(), flags | OFlag::O_CLOEXEC, Mode::S_IRUSR);
    for (number, part) in parts.iter().enumerate() {
        write(open(number, OFlag::O_CREAT | OFlag::O_WRONLY)?.as_fd(), *part)?;
    }
    restrict(pages.as_fd(), MountAttr::RDONLY)?;
    let copies = (0..parts.len()).map(|number| open(number, OFlag::O_RDONLY)).collect::<nix::Result<Vec<_>>>()?;
    for (copy, part) in copies.iter().zip(&parts) {
        // were it refused in its place, nothing would be left there
        let trial = map(copy.as_fd(), *part, None)?;
        // SAFETY: it has just been mapped, and nobody knows of it.
        check(unsafe { libc::munmap(trial, part.bytes) }.into())?;
    }
    copies.iter().zip(&parts).try_for_each(|(copy, part)| map(copy.as_fd(), *part, Some(part.start)).map(drop))
}

/// What of the mappings in `maps` (`proc_pid_maps(5)`) is of the same file as the one at `address`, cannot be written to and
/// fills huge pages.
fn parts_around(maps: &str, address: usize) -> Vec<Part> {
    let all: Vec<(usize, usize, &str, (&str, &str))> = maps.lines().filter_map(mapping).collect();
    let file = all.iter().find(|(start, end, ..)| (*start..*end).contains(&address)).map(|mapping| mapping.3);
    let of_file = all.into_iter().filter(|(.., of)| Some(*of) == file);
    let parts = of_file.filter_map(|(start, end, may, _)| {
        let (start, end) = (start.next_multiple_of(HUGE_PAGE_BYTES), end - end % HUGE_PAGE_BYTES);
        let bytes = end.checked_sub(start).filter(|bytes| *bytes > 0)?;
        matches!(may, "r-xp" | "r--p").then_some(Part { start, bytes, executable: may == "r-xp" })
    });
    parts.collect()
}

/// Start, end, permissions, and device and inode of one line.
fn mapping(line: &str) -> Option<(usize, usize, &str, (&str, &str))> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let address = |text| usize::from_str_radix(text, 16).ok();
    let (may, _offset) = (words.next()?, words.next()?);
    Some((address(start)?, address(end)?, may, (words.next()?, words.next()?)))
}

/// Fills the file with what is in the memory of `part`.
fn write(file: BorrowedFd<'_>, part: Part) -> nix::Result<()> {
    let mut done = 0;
    while done < part.bytes {
        let from = (part.start + done) as *const libc::c_void;
        let at = libc::off_t::try_from(done).map_err(|_| Errno::EOVERFLOW)?;
        // SAFETY: the kernel reads what is mapped readable there, and reports what is not.
        let written = check(unsafe { libc::pwrite(file.as_raw_fd(), from, part.bytes - done, at) } as libc::c_long)?;
        done += usize::try_from(written).ok().filter(|written| *written > 0).ok_or(Errno::EIO)?;
    }
    Ok(())
}

/// Maps the file, which is a copy of `part`, in the place of it or anywhere.
fn map(file: BorrowedFd<'_>, part: Part, place: Option<usize>) -> nix::Result<*mut libc::c_void> {
    let prot = libc::PROT_READ | if part.executable { libc::PROT_EXEC } else { 0 };
    let flags = libc::MAP_PRIVATE | if place.is_some() { libc::MAP_FIXED } else { 0 };
    let place = place.unwrap_or_default() as *mut libc::c_void;
    // SAFETY: where the kernel chooses there is nothing else. In the place of `part` there are the same bytes before and
    // after, which nobody writes to; the kernel changes one for the other within the call, and there is no other thread to
    // run meanwhile.
    let mapped = unsafe { libc::mmap(place, part.bytes, prot, flags, file.as_raw_fd(), 0) };
    if mapped == libc::MAP_FAILED { Err(Errno::last()) } else { Ok(mapped) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_huge_pages_of_the_same_file_that_nobody_writes_to_are_taken() {
        let maps = "\
55d5c0000000-55d5c0bd3000 r--p 00000000 fe:00 77 /bin/holm
55d5c0bd4000-55d5c22a1000 r-xp 00bd3000 fe:00 77 /bin/holm
55d5c22a1000-55d5c2500000 rw-p 0229f000 fe:00 77 /bin/holm
55d5c2500000-55d5c2501000 r--p 023d6000 fe:00 77 /bin/holm
55d5c4000000-55d5c8000000 rw-p 00000000 00:00 0 [heap]
7f0000000000-7f0000800000 r-xp 00000000 fe:00 78 /lib/libc.so.6
7f0001000000-7f0001001000 r-xp
";
        let parts = [
            Part { start: 0x55d5_c000_0000, bytes: 0xa0_0000, executable: false },
            Part { start: 0x55d5_c0c0_0000, bytes: 0x160_0000, executable: true },
        ];
        assert_eq!(parts_around(maps, 0x55d5_c0bd_5000), parts);
        assert_eq!(parts_around(maps, 0x7f00_0000_1000).len(), 1);
        assert_eq!(parts_around(maps, 0x1000), []);
    }
}
