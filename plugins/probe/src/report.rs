//! Everything that a process can find out about itself and its surroundings, as JSON.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::sys;

/// Entries of the file tree that are listed at most.
const MAX_ENTRIES: usize = 200;

pub(crate) fn everything() -> Value {
    json!({
        "args": std::env::args().collect::<Vec<_>>(),
        "env": std::env::vars().collect::<BTreeMap<_, _>>(),
        "cwd": std::env::current_dir().map(|dir| dir.display().to_string()).unwrap_or_default(),
        "exe": link("/proc/self/exe"),
        "hostname": sys::hostname(),
        "umask": sys::umask(),
        "dumpable": sys::dumpable(),
        "status": status("/proc/self/status"),
        "init_status": status("/proc/1/status"),
        "namespaces": namespaces(),
        "cgroup": lines("/proc/self/cgroup"),
        "mounts": lines("/proc/self/mountinfo"),
        "uid_map": lines("/proc/self/uid_map"),
        "gid_map": lines("/proc/self/gid_map"),
        "oom_score_adj": lines("/proc/self/oom_score_adj"),
        "fds": fds(),
        "tree": tree(),
        "pids": pids(),
        "proc": names_in_proc(),
        "net": interfaces(),
        "rlimits": rlimits(),
        "landlock_proof": fs::File::open("/.landlock").map(|_| "opened".to_owned()).unwrap_or_else(|e| e.to_string()),
        "sockets": crate::reach::sockets(),
        "kin": kin(),
        "terminal": fs::File::open("/dev/tty").map(|_| "opened".to_owned()).unwrap_or_else(|e| e.to_string()),
    })
}

fn link(path: &str) -> Value {
    fs::read_link(path).map(|target| Value::from(target.display().to_string())).unwrap_or(Value::Null)
}

fn lines(path: &str) -> Value {
    match fs::read_to_string(path) {
        Ok(text) => text.lines().collect::<Vec<_>>().into(),
        Err(error) => Value::from(error.to_string()),
    }
}

fn status(path: &str) -> Value {
    let Ok(text) = fs::read_to_string(path) else {
        return Value::Null;
    };
    let fields = text.lines().filter_map(|line| line.split_once(':'));
    fields.map(|(key, value)| (key.to_owned(), Value::from(value.trim()))).collect::<Map<_, _>>().into()
}

fn namespaces() -> Value {
    let names = ["user", "pid", "mnt", "uts", "ipc", "net", "cgroup"];
    let number = |name: &str| -> Option<u64> {
        let target = fs::read_link(format!("/proc/self/ns/{name}")).ok()?.to_string_lossy().into_owned();
        target.split_once('[')?.1.strip_suffix(']')?.parse().ok()
    };
    names.into_iter().map(|name| (name.to_owned(), json!(number(name)))).collect::<Map<_, _>>().into()
}

/// What each open descriptor is, the one that reads the directory left out.
fn fds() -> Value {
    let Ok(dir) = fs::read_dir("/proc/self/fd") else {
        return Value::Null;
    };
    let numbers: Vec<String> = dir.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    let open = numbers.into_iter().filter_map(|fd| {
        let target = fs::read_link(format!("/proc/self/fd/{fd}")).ok()?;
        Some((fd, Value::from(target.display().to_string())))
    });
    open.collect::<Map<_, _>>().into()
}

/// Every file below `/`, `/proc` left out: mode, owner, kind.
fn tree() -> Value {
    let mut found = Map::new();
    let mut waiting = vec![std::path::PathBuf::from("/")];
    while let Some(path) = waiting.pop() {
        let Ok(metadata) = fs::symlink_metadata(&path) else {
            continue;
        };
        let kind = metadata.file_type();
        let word = if kind.is_dir() {
            "directory"
        } else if kind.is_symlink() {
            "link"
        } else if kind.is_char_device() {
            "device"
        } else {
            "file"
        };
        let (mode, uid) = (metadata.mode() & 0o7777, metadata.uid());
        found.insert(
            path.display().to_string(),
            json!({"kind": word, "mode": format!("{mode:o}"), "uid": uid, "rdev": metadata.rdev()}),
        );
        if kind.is_dir() && path != Path::new("/proc") && found.len() < MAX_ENTRIES {
            waiting.extend(fs::read_dir(&path).into_iter().flatten().flatten().map(|entry| entry.path()));
        }
    }
    found.into()
}

/// The pids that `/proc` shows.
fn pids() -> Value {
    let Ok(dir) = fs::read_dir("/proc") else {
        return Value::Null;
    };
    let numbers = dir.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    numbers.collect::<Vec<_>>().into()
}

/// What `/proc` shows besides pids.
fn names_in_proc() -> Value {
    let Ok(dir) = fs::read_dir("/proc") else {
        return Value::Null;
    };
    let names = dir.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = names.filter(|name| name.parse::<u32>().is_err()).collect();
    names.sort();
    names.into()
}

fn kin() -> Value {
    let (session, group, parent) = sys::kin();
    json!({"session": session, "group": group, "parent": parent})
}

/// Network interfaces and whether they are up.
fn interfaces() -> Value {
    lines("/proc/self/net/dev")
}

fn rlimits() -> Value {
    let named = [
        ("nofile", libc::RLIMIT_NOFILE),
        ("core", libc::RLIMIT_CORE),
        ("stack", libc::RLIMIT_STACK),
        ("memlock", libc::RLIMIT_MEMLOCK),
        ("msgqueue", libc::RLIMIT_MSGQUEUE),
        ("rtprio", libc::RLIMIT_RTPRIO),
        ("nice", libc::RLIMIT_NICE),
        ("sigpending", libc::RLIMIT_SIGPENDING),
        ("as", libc::RLIMIT_AS),
    ];
    named
        .into_iter()
        .map(|(name, resource)| (name.to_owned(), json!(sys::rlimit(resource))))
        .collect::<Map<_, _>>()
        .into()
}
