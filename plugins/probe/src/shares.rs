//! What controllers divide between tenants, as it is felt: CPUs, block devices, huge pages, marks on packets.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs::{self, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::Result;

/// Keeps `threads` threads busy for a while. The CPUs on which any of them has been.
pub(crate) fn cpus(threads: usize, time: Duration) -> Value {
    let busy = move || {
        let (start, mut seen) = (Instant::now(), BTreeSet::new());
        while start.elapsed() < time {
            // SAFETY: no memory is involved.
            seen.insert(unsafe { libc::sched_getcpu() });
        }
        seen
    };
    let threads: Vec<_> = (0..threads).map(|_| thread::spawn(busy)).collect();
    let seen: BTreeSet<i32> = threads.into_iter().filter_map(|thread| thread.join().ok()).flatten().collect();
    json!(seen)
}

/// Reads or writes blocks past the page cache, one at a time from the start and over again. How many there were, and in
/// what time.
pub(crate) fn direct(way: &str, path: &str, block: usize, time: Duration) -> Result<Value> {
    const ALIGNED: usize = 4096;
    let writes = way == "write";
    let mut file = OpenOptions::new().read(!writes).write(writes).custom_flags(libc::O_DIRECT).open(path)?;
    let size = file.seek(SeekFrom::End(0))?;
    let blocks = size.checked_div(u64::try_from(block)?).filter(|blocks| *blocks > 0).ok_or("no block")?;
    let mut memory = vec![0_u8; block + ALIGNED];
    let skipped = memory.as_ptr().align_offset(ALIGNED);
    let buffer = &mut memory[skipped..skipped + block];
    let (start, mut done) = (Instant::now(), 0_u64);
    while start.elapsed() < time {
        let at = done % blocks * u64::try_from(block)?;
        if writes { file.write_all_at(buffer, at) } else { file.read_exact_at(buffer, at) }?;
        done += 1;
    }
    Ok(json!({"blocks": done, "us": u64::try_from(start.elapsed().as_micros())?}))
}

/// Opens a file in one way, `r`, `w` or `rw`, for each of `ways`: 0 or the errno. And whose it is, with which mode.
pub(crate) fn node(path: &str, ways: &[&str]) -> Result<Value> {
    let errno = |way: &&str| {
        let opened = OpenOptions::new().read(way.contains('r')).write(way.contains('w')).open(path);
        opened.map_or_else(|error| error.raw_os_error().unwrap_or(-1), |_| 0)
    };
    let about = fs::metadata(path)?;
    // SAFETY: no memory is involved.
    let own = about.uid() == unsafe { libc::getuid() };
    let mode = format!("{:o}", about.mode() & 0o7777);
    Ok(json!({"errnos": ways.iter().map(errno).collect::<Vec<_>>(), "own": own, "mode": mode}))
}

/// Makes a device node of its own and opens it: 0 or the errno of each.
pub(crate) fn make_node(path: &str, major: u32, minor: u32) -> Result<Value> {
    let name = CString::new(path)?;
    // SAFETY: `name` outlives the call.
    let made = unsafe { libc::mknod(name.as_ptr(), libc::S_IFBLK | 0o600, libc::makedev(major, minor)) };
    let made = if made == 0 { 0 } else { io::Error::last_os_error().raw_os_error().unwrap_or(-1) };
    let opened = OpenOptions::new().read(true).open(path);
    let opened = opened.map_or_else(|error| error.raw_os_error().unwrap_or(-1), |_| 0);
    let _ = fs::remove_file(path);
    Ok(json!({"made": made, "opened": opened}))
}

/// Maps huge pages of 2 MiB and touches each. How many bytes, or the errno of the map.
pub(crate) fn huge_map(bytes: usize) -> Value {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;
    // SAFETY: a new mapping, at an address of the kernel's choice.
    let map = unsafe { libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    if map == libc::MAP_FAILED {
        return json!({"errno": io::Error::last_os_error().raw_os_error()});
    }
    for at in (0..bytes).step_by(2 << 20) {
        // SAFETY: it is within the mapping, which nobody else knows of.
        unsafe { map.cast::<u8>().wrapping_add(at).write_volatile(1) };
    }
    json!({"bytes": bytes})
}

/// Waits for a line of input, so that it can be put somewhere; then makes an internet socket, sends itself a packet on
/// the loopback interface, and tells the mark and the priority that came with it.
pub(crate) fn packet() -> Result<Value> {
    io::stdin().read_line(&mut String::new())?;
    let socket = std::net::UdpSocket::bind("127.0.0.1:0")?;
    const SO_RCVMARK: i32 = 75;
    const SO_RCVPRIORITY: i32 = 82;
    for option in [SO_RCVMARK, SO_RCVPRIORITY] {
        let on: i32 = 1;
        // SAFETY: `on` outlives the call, and the size is its own. A kernel that does not know the option says nothing.
        unsafe {
            libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, (&raw const on).cast(), 4);
        }
    }
    socket.send_to(b"packet", socket.local_addr()?)?;
    let (mut data, mut control) = ([0_u8; 16], [0_u64; 32]);
    let mut part = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() };
    // SAFETY: all-zero is an empty message.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    // SAFETY: everything that `message` points to outlives the call.
    if unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, 0) } < 0 {
        return Err(io::Error::last_os_error().into());
    }
    let mut told = json!({"mark": 0, "priority": 0});
    // SAFETY: the kernel has filled the message in.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    while !header.is_null() {
        // SAFETY: it lies within `control`.
        let kind = unsafe { (*header).cmsg_type };
        // SAFETY: as above.
        let data = unsafe { libc::CMSG_DATA(header) };
        // SAFETY: every message of this level has at least the four bytes of a word.
        let value = unsafe { data.cast::<u32>().read_unaligned() };
        match kind {
            SO_RCVMARK | libc::SO_MARK => told["mark"] = value.into(),
            SO_RCVPRIORITY | libc::SO_PRIORITY => told["priority"] = value.into(),
            _ => {}
        }
        // SAFETY: as above.
        header = unsafe { libc::CMSG_NXTHDR(&raw const message, header) };
    }
    Ok(told)
}
