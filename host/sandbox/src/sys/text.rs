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
    /// What is mapped in its place: it, and the rest of its first and its last huge page, as far as nothing else is there.
    place: Place,
}

/// A range of addresses, and where in the file that holds all parts its content is: as far from the beginning of a huge page
/// as in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    start: usize,
    bytes: usize,
    offset: usize,
}

/// Puts copies in huge pages in the place of what the program's file is mapped to and nobody writes to. They are on a
/// read-only file system of their own, of which nobody has a descriptor afterwards.
///
/// So are the constants that the loader has put addresses into. In the file's own mapping they are pages of this process
/// alone, some 330, and a clone copies the entry of each; of another file's it has nothing to copy.
///
/// # Errors
/// Those of making it, for instance `EINVAL` where the kernel has no huge pages. Nothing is changed then.
pub(crate) fn move_to_huge_pages(_proof: &SingleThreaded) -> nix::Result<()> {
    let maps = fs::read_to_string("/proc/self/maps").map_err(|error| errno_of(&error))?;
    let parts = parts_around(&maps, move_to_huge_pages as *const () as usize);
    let attr = MountAttr::NOSUID | MountAttr::NODEV;
    let pages = new_mount(c"tmpfs", &[(c"huge", c"always"), (c"nr_inodes", c"4"), (c"mode", c"0700")], attr)?;
    let open = |flags| openat(&pages, "program", flags | OFlag::O_CLOEXEC, Mode::S_IRUSR);
    let copy = open(OFlag::O_CREAT | OFlag::O_WRONLY)?;
    parts.iter().try_for_each(|part| write(copy.as_fd(), *part))?;
    drop(copy);
    restrict(pages.as_fd(), MountAttr::RDONLY)?;
    let copy = open(OFlag::O_RDONLY)?;
    for part in &parts {
        // were it refused in its place, nothing would be left there
        let trial = map(copy.as_fd(), *part, false)?;
        // SAFETY: it has just been mapped, and nobody knows of it.
        check(unsafe { libc::munmap(trial, part.place.bytes) }.into())?;
    }
    parts.iter().try_for_each(|part| map(copy.as_fd(), *part, true).map(drop))
}

/// What of the mappings in `maps` (`proc_pid_maps(5)`) is of the same file as the one at `address`, and cannot be written to.
fn parts_around(maps: &str, address: usize) -> Vec<Part> {
    let all: Vec<(usize, usize, &str, (&str, &str))> = maps.lines().filter_map(mapping).collect();
    let file = all.iter().find(|(start, end, ..)| (*start..*end).contains(&address)).map(|mapping| mapping.3);
    let of_file = |index: &usize| Some(all[*index].3) == file && matches!(all[*index].2, "r-xp" | "r--p");
    let first = (0..all.len()).find(of_file).map_or(0, |index| all[index].0);
    let part = |index: usize| {
        let (start, end, may, _) = all[index];
        let before = index.checked_sub(1).map_or(0, |before| all[before].1);
        let after = all.get(index + 1).map_or(usize::MAX, |after| after.0);
        let (wide_start, wide_end) = (start - start % HUGE_PAGE_BYTES, end.next_multiple_of(HUGE_PAGE_BYTES));
        let place_start = if wide_start < before { start } else { wide_start };
        let place_end = if wide_end > after { end } else { wide_end };
        let offset = place_start - (first - first % HUGE_PAGE_BYTES);
        let place = Place { start: place_start, bytes: place_end - place_start, offset };
        Part { start, bytes: end - start, executable: may == "r-xp", place }
    };
    (0..all.len()).filter(of_file).map(part).collect()
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
        let at = libc::off_t::try_from(part.place.offset + (part.start - part.place.start) + done)
            .map_err(|_| Errno::EOVERFLOW)?;
        // SAFETY: the kernel reads what is mapped readable there, and reports what is not.
        let written = check(unsafe { libc::pwrite(file.as_raw_fd(), from, part.bytes - done, at) } as libc::c_long)?;
        done += usize::try_from(written).ok().filter(|written| *written > 0).ok_or(Errno::EIO)?;
    }
    Ok(())
}

/// Maps what of the file belongs in the place of `part`, there or anywhere.
fn map(file: BorrowedFd<'_>, part: Part, there: bool) -> nix::Result<*mut libc::c_void> {
    let prot = libc::PROT_READ | if part.executable { libc::PROT_EXEC } else { 0 };
    let flags = libc::MAP_PRIVATE | if there { libc::MAP_FIXED } else { 0 };
    let start = if there { part.place.start as *mut libc::c_void } else { std::ptr::null_mut() };
    let offset = libc::off_t::try_from(part.place.offset).map_err(|_| Errno::EOVERFLOW)?;
    // SAFETY: where the kernel chooses there is nothing else. In the place of `part` there are the same bytes before and
    // after, which nobody writes to, and around it nothing; the kernel changes one for the other within the call, and there
    // is no other thread to run meanwhile.
    let mapped = unsafe { libc::mmap(start, part.place.bytes, prot, flags, file.as_raw_fd(), offset) };
    if mapped == libc::MAP_FAILED { Err(Errno::last()) } else { Ok(mapped) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
55d5c0000000-55d5c0bd3000 r--p 00000000 fe:00 77 /bin/holm
55d5c0e04000-55d5c24d1000 r-xp 00c04000 fe:00 77 /bin/holm
55d5c2700000-55d5c2800000 rw-p 0229f000 fe:00 77 /bin/holm
55d5c2800000-55d5c2801000 r--p 023d6000 fe:00 77 /bin/holm
55d5c2801000-55d5c8000000 rw-p 00000000 00:00 0 [heap]
7f0000000000-7f0000800000 r-xp 00000000 fe:00 78 /lib/libc.so.6
7f0001000000-7f0001001000 r-xp
";

    #[test]
    fn all_of_the_same_file_that_nobody_writes_to_is_taken_with_what_is_free_around_it() {
        let base = 0x55d5_c000_0000;
        let part = |(start, bytes), executable, (wide, wide_bytes)| {
            let place = Place { start: base + wide, bytes: wide_bytes, offset: wide };
            Part { start: base + start, bytes, executable, place }
        };
        let parts = [
            // the next begins in the huge page in which this one ends
            part((0, 0xbd_3000), false, (0, 0xc0_0000)),
            part((0xe0_4000, 0x16c_d000), true, (0xe0_0000, 0x180_0000)),
            part((0x280_0000, 0x1000), false, (0x280_0000, 0x1000)),
        ];
        assert_eq!(parts_around(MAPS, base + 0xe0_5000), parts);
        assert_eq!(parts_around(MAPS, 0x7f00_0000_1000).len(), 1);
        assert_eq!(parts_around(MAPS, 0x1000), []);
    }

    #[test]
    fn each_part_is_as_far_into_a_huge_page_of_the_file_as_of_memory() {
        let crowded = MAPS.replace("55d5c0e04000", "55d5c0bd4000");
        for part in parts_around(&crowded, 0x55d5_c0bd_5000) {
            assert_eq!(part.place.start % HUGE_PAGE_BYTES, part.place.offset % HUGE_PAGE_BYTES, "{part:x?}");
            assert!(part.place.start <= part.start && part.place.bytes >= part.bytes);
        }
    }
}
