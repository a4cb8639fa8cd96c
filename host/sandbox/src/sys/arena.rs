//! The program's allocator: the system's, and in a sandbox that was cloned from a zygote, an arena before that.
//!
//! What such a sandbox allocates from the system's heap lies between what its zygote has allocated, on pages that the two
//! have in common: to write there is to copy a page, some fifty times a job. In an arena it lies close together, on pages
//! that come all at once. The sandbox ends soon, so nothing there is used again but what was allocated last; what finds no
//! room any more, or is large, is the system's again.

use std::alloc::{GlobalAlloc, Layout, System};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use nix::errno::Errno;

use super::check;
use super::process::SingleThreaded;

/// A job of a small HTTP component takes some 100 KiB of it.
const ARENA_BYTES: usize = 256 << 10;

/// Of that, what every job takes.
const SURELY_USED: usize = 64 << 10;

/// The longest piece that is taken from the arena.
const MAX_PIECE: usize = 16 << 10;

/// What its start is aligned to.
const PAGE_BYTES: usize = 4096;

/// The allocator of a program that starts sandboxes: `#[global_allocator]`.
#[derive(Clone, Copy, Debug)]
pub struct Allocator;

/// The arena of this process, which has one thread if there is any.
struct Arena {
    /// Null if there is none.
    start: AtomicPtr<u8>,
    used: AtomicUsize,
}

static ARENA: Arena = Arena { start: AtomicPtr::new(ptr::null_mut()), used: AtomicUsize::new(0) };

/// Has this process take small pieces of memory from an arena from now on.
///
/// # Errors
/// Those of `mmap(2)`.
pub(crate) fn open(_proof: &SingleThreaded) -> nix::Result<()> {
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: new memory where the kernel chooses.
    let start = unsafe { libc::mmap(ptr::null_mut(), ARENA_BYTES, prot, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(Errno::last());
    }
    ARENA.start.store(start.cast(), Ordering::Relaxed);
    Ok(())
}

/// Has the kernel make the pages that are sure to be used, at once.
///
/// # Errors
/// Those of `madvise(2)`, for instance `EINVAL` before Linux 5.14. They come one by one then.
pub(crate) fn populate() -> nix::Result<()> {
    let start = ARENA.start.load(Ordering::Relaxed);
    if start.is_null() {
        return Ok(());
    }
    // SAFETY: the memory is this module's own, and its content stays.
    let ret = unsafe { libc::madvise(start.cast(), SURELY_USED, libc::MADV_POPULATE_WRITE) };
    check(ret.into()).map(drop)
}

impl Arena {
    fn take(&self, layout: Layout) -> Option<NonNull<u8>> {
        let start = NonNull::new(self.start.load(Ordering::Relaxed))?;
        if layout.size() > MAX_PIECE || layout.align() > PAGE_BYTES {
            return None;
        }
        let at = self.used.load(Ordering::Relaxed).next_multiple_of(layout.align());
        let end = at + layout.size();
        if end > ARENA_BYTES {
            return None;
        }
        self.used.store(end, Ordering::Relaxed);
        // SAFETY: `at` is within the arena.
        Some(unsafe { start.add(at) })
    }

    /// Where in the arena this is, if it is.
    fn offset(&self, piece: *mut u8) -> Option<usize> {
        let start = self.start.load(Ordering::Relaxed);
        let offset = piece.addr().checked_sub(start.addr()).filter(|offset| *offset < ARENA_BYTES);
        offset.filter(|_| !start.is_null())
    }

    /// Makes a piece at `offset` longer or shorter where it is, if it is the last one.
    fn resize_last(&self, offset: usize, old: usize, new: usize) -> bool {
        let is_last = offset + old == self.used.load(Ordering::Relaxed);
        let fits = is_last && new <= MAX_PIECE && offset + new <= ARENA_BYTES;
        if fits {
            self.used.store(offset + new, Ordering::Relaxed);
        }
        fits
    }
}

// SAFETY: a piece is the system's or lies in the arena, and each call tells which by the address. In the arena pieces do not
// overlap: a new one begins where all others end. An arena is opened by a process of one thread, which makes no other.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match ARENA.take(layout) {
            Some(piece) => piece.as_ptr(),
            // SAFETY: the caller's own promises.
            None => unsafe { System.alloc(layout) },
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let Some(piece) = ARENA.take(layout) else {
            // SAFETY: the caller's own promises.
            return unsafe { System.alloc_zeroed(layout) };
        };
        // SAFETY: it is as long as that. It may have been used before.
        unsafe { piece.write_bytes(0, layout.size()) };
        piece.as_ptr()
    }

    unsafe fn dealloc(&self, piece: *mut u8, layout: Layout) {
        match ARENA.offset(piece) {
            Some(offset) => drop(ARENA.resize_last(offset, layout.size(), 0)),
            // SAFETY: what is not in the arena is the system's, and the rest the caller has promised.
            None => unsafe { System.dealloc(piece, layout) },
        }
    }

    unsafe fn realloc(&self, piece: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let Some(offset) = ARENA.offset(piece) else {
            // SAFETY: what is not in the arena is the system's, and the rest the caller has promised.
            return unsafe { System.realloc(piece, layout, size) };
        };
        if size <= layout.size() || ARENA.resize_last(offset, layout.size(), size) {
            return piece;
        }
        // SAFETY: the caller has promised that the size is no overflow with this alignment.
        let longer = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        // SAFETY: nor is it 0.
        let new = unsafe { self.alloc(longer) };
        if !new.is_null() {
            // SAFETY: the new piece is longer than the old one, and another.
            unsafe { ptr::copy_nonoverlapping(piece, new, layout.size()) };
        }
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(align(4096))]
    struct Pages([u8; ARENA_BYTES]);

    fn arena() -> Arena {
        let memory = Box::leak(Box::new(Pages([0; ARENA_BYTES])));
        Arena { start: AtomicPtr::new(memory.0.as_mut_ptr()), used: AtomicUsize::new(0) }
    }

    fn layout(size: usize, align: usize) -> Layout {
        Layout::from_size_align(size, align).unwrap()
    }

    #[test]
    fn pieces_lie_one_behind_the_other_as_aligned_as_asked_for() {
        let arena = arena();
        let take = |size, align| arena.offset(arena.take(layout(size, align)).unwrap().as_ptr()).unwrap();
        assert_eq!([take(1, 1), take(8, 8), take(3, 1), take(64, 64), take(1, 1)], [0, 8, 16, 64, 128]);
    }

    #[test]
    fn only_the_last_piece_can_be_given_back_or_grow() {
        let arena = arena();
        let [one, two] = [16, 16].map(|size| arena.offset(arena.take(layout(size, 1)).unwrap().as_ptr()).unwrap());
        assert!(!arena.resize_last(one, 16, 0) && !arena.resize_last(one, 16, 32));
        assert!(arena.resize_last(two, 16, 64) && arena.resize_last(two, 64, 0));
        assert_eq!(arena.offset(arena.take(layout(1, 1)).unwrap().as_ptr()), Some(two));
    }

    #[test]
    fn what_is_large_or_finds_no_room_is_not_taken_from_it() {
        let arena = arena();
        assert!(arena.take(layout(MAX_PIECE + 1, 1)).is_none() && arena.take(layout(1, 2 * PAGE_BYTES)).is_none());
        let pieces = std::iter::from_fn(|| arena.take(layout(MAX_PIECE, 1))).count();
        assert_eq!(pieces, ARENA_BYTES / MAX_PIECE);
        assert!(arena.take(layout(1, 1)).is_none() && !arena.resize_last(ARENA_BYTES - 1, 1, 2));
        assert_eq!(arena.offset(ptr::null_mut()), None);
        let none = Arena { start: AtomicPtr::new(ptr::null_mut()), used: AtomicUsize::new(0) };
        assert!(none.take(layout(1, 1)).is_none() && none.offset(ptr::without_provenance_mut(8)).is_none());
    }
}
