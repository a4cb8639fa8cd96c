//! Starts that are refused: each says what is wrong and what to do about it, and leaves nothing behind.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

mod support;

use std::fs;
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use holm_sandbox::cgroup::Plan;
use serde_json::{Value, json};
use support::{OPERATOR, Server};
use tempfile::TempDir;

const EX_USAGE: i32 = 64;
const EX_UNAVAILABLE: i32 = 69;
const EX_OSERR: i32 = 71;
const EX_CONFIG: i32 = 78;

/// Runs a server that must refuse to start with this code and all these words. Gives what it said.
#[track_caller]
fn refuse(dir: &TempDir, mut command: Command, code: i32, words: &[&str]) -> String {
    let output = command.stdout(Stdio::piped()).stderr(Stdio::piped()).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert!(output.stdout.is_empty() && !said.contains("panicked"), "{said}");
    for word in words {
        assert!(said.contains(word), "no {word:?} in: {said}");
    }
    let instance = fs::read_to_string(dir.path().join("data/instance")).unwrap_or("none".into());
    for cgroups in Plan::for_this_process().unwrap().describe().values() {
        assert!(!Path::new(cgroups).join(format!("holm-{instance}")).exists(), "a cgroup is left in {cgroups}");
    }
    said
}

#[test]
fn a_configuration_that_cannot_be_is_refused_by_key_and_value() {
    for (config, words) in [
        ("jobs_runing = 1", &["holm.toml", "unknown field `jobs_runing`", "`jobs_running`"][..]),
        ("jobs_running = 'many'", &["holm.toml", "jobs_running", "invalid type"]),
        ("jobs_running = 0", &["`jobs_running` is 0; it must be 1 or more"]),
        ("[job_maximums]\npids = 5\n[job_defaults]\npids = 6", &["`job_defaults`", "pids", "6", "5"]),
        ("jobs_running", &["holm.toml", "line ", "| jobs_running"]),
        ("log = 'holm=loud'", &["loud"]),
        ("user = 'nobody-of-this-name'", &["there is no user `nobody-of-this-name`"]),
        ("listen = '0.0.0.0:1'", &["`0.0.0.0:1` is not a loopback address", "--plain-http", "proxy"]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Server::command(&dir, config);
        if config.starts_with("listen") {
            command = serve(&dir);
            command.env("HOLM_LISTEN", "0.0.0.0:1").env("HOLM_OPERATOR_KEY", OPERATOR);
        }
        refuse(&dir, command, EX_CONFIG, words);
    }
}

/// A command in an environment with nothing in it.
fn command(words: &[&str]) -> Command {
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).env_clear().env("PATH", std::env::var_os("PATH").unwrap());
    command
}

/// A server's command line with nothing but a data directory.
fn serve(dir: &TempDir) -> Command {
    let mut command = command(&[env!("CARGO_BIN_EXE_holm")]);
    command.arg("serve").arg("--data-dir").arg(dir.path().join("data")).stdin(Stdio::null());
    command
}

#[test]
fn a_configuration_that_cannot_be_read_is_named() {
    let dir = tempfile::tempdir().unwrap();
    for (path, why) in [(dir.path().join("nowhere.toml"), "No such file"), (dir.path().to_owned(), "Is a directory")] {
        let mut command = serve(&dir);
        command.arg("--config").arg(&path);
        refuse(&dir, command, EX_CONFIG, &["read the configuration", path.to_str().unwrap(), why]);
    }
    let mut command = serve(&dir);
    command.env("HOLM_JOBS_RUNING", "1");
    refuse(&dir, command, EX_CONFIG, &["HOLM_JOBS_RUNING", "unknown field `jobs_runing`"]);
    let mut command = serve(&dir);
    command.args(["--listen", "localhost"]);
    refuse(&dir, command, EX_USAGE, &["'localhost' for '--listen <ADDR>'", "--help"]);
    assert!(!dir.path().join("data").exists(), "nothing is made for a configuration that cannot be");
}

#[test]
fn a_weak_key_or_one_that_cannot_be_read_is_refused_and_never_told() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("key");
    for weak in ["short-but-secret", "", "thirty-two-characters-and-a-space ", "schlüssel-von-mehr-als-32-zeichen"] {
        let what = "an operator key is 32 or more visible ASCII characters";
        let mut command = Server::command(&dir, "");
        command.env("HOLM_OPERATOR_KEY", weak);
        let said = refuse(&dir, command, EX_CONFIG, &["HOLM_OPERATOR_KEY", what]);
        assert!(weak.is_empty() || !said.contains(weak), "{said}");
    }
    fs::write(&file, "short-but-secret\n").unwrap();
    for (path, why) in [(&file, "32 or more"), (&dir.path().join("nowhere"), "No such file")] {
        let mut command = Server::command(&dir, &format!("operator_key_file = {:?}", path.to_str().unwrap()));
        command.env_remove("HOLM_OPERATOR_KEY");
        let said = refuse(&dir, command, EX_CONFIG, &["operator key", path.to_str().unwrap(), why]);
        assert!(!said.contains("short-but-secret"), "{said}");
    }
}

#[test]
fn without_a_key_the_first_start_makes_one_and_says_where_it_is_and_never_what() {
    let mut dir = tempfile::tempdir().unwrap();
    let mut keys = Vec::new();
    for _ in 0..2 {
        let mut command = Server::command(&dir, "");
        command.env_remove("HOLM_OPERATOR_KEY");
        let server = Server::spawn(command, dir);
        let path = server.data().join("operator.key");
        let key = fs::read_to_string(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        server.send(&key, "GET", "/v1/tenants", &[], b"").expect(200);
        server.send(OPERATOR, "GET", "/v1/tenants", &[], b"").problem(401);
        assert!(server.log().contains("operator.key") && !server.log().contains(&key), "{}", server.log());
        keys.push(key);
        dir = server.stop();
    }
    assert!(keys[0] == keys[1] && keys[0].len() >= 32);
}

#[test]
fn a_port_that_is_taken_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let mut command = serve(&dir);
    command.args(["--listen", &address]).env("HOLM_OPERATOR_KEY", OPERATOR);
    refuse(&dir, command, EX_UNAVAILABLE, &[&format!("listen on {address}"), "Address already in use", "--listen"]);
}

#[test]
fn a_data_directory_that_cannot_be_made_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = serve(&dir);
    command.args(["--listen", "127.0.0.1:0"]).env("HOLM_OPERATOR_KEY", OPERATOR);
    fs::write(dir.path().join("data"), "no directory").unwrap();
    let data = dir.path().join("data");
    refuse(&dir, command, EX_OSERR, &["data directory", data.to_str().unwrap()]);
}

/// What `holm doctor` finds wrong, run by `prefix`. Its verdict must be in accordance.
fn doctor(prefix: &[&str], lock_dir: &str) -> Vec<(String, String, String)> {
    let tmp = tempfile::tempdir().unwrap();
    let words = [prefix, &[env!("CARGO_BIN_EXE_holm"), "doctor", "--lock-dir", lock_dir]].concat();
    let mut command = command(&words);
    command.env("TMPDIR", tmp.path());
    let table = command.output().unwrap();
    let report = command.arg("--json").output().unwrap();
    let (table, report_text) = (String::from_utf8(table.stdout).unwrap(), String::from_utf8(report.stdout).unwrap());
    let json: Value = serde_json::from_str(&report_text).unwrap_or_else(|error| panic!("{error}: {report_text}"));
    let text = |check: &Value, key: &str| check[key].as_str().unwrap().to_owned();
    let failed: Vec<_> = json["checks"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|check| check["status"] == "fail")
        .map(|check| (text(check, "name"), text(check, "found"), text(check, "mend")))
        .collect();
    assert_eq!(json["isolates"], json!(failed.is_empty()));
    assert_eq!(report.status.code(), Some(if failed.is_empty() { 0 } else { EX_UNAVAILABLE }));
    for (name, found, mend) in &failed {
        assert!(table.contains(&format!("FAIL  {name:<14} {found}")) && table.contains(mend.as_str()), "{table}");
    }
    assert_eq!(tmp.path().read_dir().unwrap().count(), 0, "it leaves nothing behind");
    failed
}

/// Runs doctor and server by `prefix`, where they cannot isolate. Both must name the same things, which are given, with
/// a remedy for each; and the server must not have made its data directory.
#[track_caller]
fn both_refuse(prefix: &[&str], lock_dir: &str) -> Vec<(String, String)> {
    let failed = doctor(prefix, lock_dir);
    let dir = tempfile::tempdir().unwrap();
    let words = [prefix, &[env!("CARGO_BIN_EXE_holm"), "serve", "--listen", "127.0.0.1:0", "--data-dir"]].concat();
    let mut command = command(&words);
    command.arg(dir.path().join("data")).env("HOLM_LOCK_DIR", lock_dir);
    let said = refuse(&dir, command, EX_UNAVAILABLE, &["this machine cannot isolate jobs, so nothing is served"]);
    assert_eq!(said.matches("mend: ").count(), failed.len(), "{said}");
    for (name, found, mend) in &failed {
        assert!(!mend.is_empty() && said.contains(&format!("{name}: {found}\n      mend: {mend}")), "{said}");
    }
    assert!(!dir.path().join("data").exists());
    failed.into_iter().map(|(name, found, _)| (name, found)).collect()
}

#[test]
fn where_jobs_can_be_isolated_the_doctor_says_so() {
    let locks = tempfile::tempdir().unwrap();
    assert_eq!(doctor(&["env"], locks.path().to_str().unwrap()), []);
}

#[test]
fn everything_that_is_missing_is_named_at_once_with_its_remedy() {
    let hidden = tempfile::tempdir().unwrap();
    let cgroups = Plan::for_this_process().unwrap().describe();
    // in a mount namespace of its own one controller is hidden by another mount and one is read-only
    let spoil = "mount --bind $1 $2 && mount --bind $3 $3 && mount -o remount,bind,ro $3 && shift 3 && exec \"$@\"";
    let empty = hidden.path().to_str().unwrap();
    let prefix = [
        &["unshare", "--mount", "sh", "-c", spoil, "sh", empty, &cgroups["pids"], &cgroups["freezer"]][..],
        &["setpriv", "--bounding-set=-mknod,-kill"],
    ];
    let missing = both_refuse(&prefix.concat(), "/proc/nowhere");
    // on pure v2 all are in the one directory
    let out_of_reach =
        if cgroups["pids"] == cgroups["cpu"] { "cpu, cpuacct, memory, pids, freezer" } else { "pids, freezer" };
    let out_of_reach = format!("this process can make no cgroups of {out_of_reach}");
    let expected = [
        ("privileges", "missing CAP_KILL, CAP_MKNOD"),
        ("cgroups", &*out_of_reach),
        ("uids", "open `/proc/nowhere/uid-blocks`: No such file or directory (os error 2)"),
    ];
    assert_eq!(missing, expected.map(|(name, found)| (name.to_owned(), found.to_owned())));
}

#[test]
fn namespaces_that_are_switched_off_are_named() {
    let off = "echo 0 >/proc/sys/user/max_net_namespaces && echo 0 >/proc/sys/user/max_ipc_namespaces && exec \"$@\"";
    let locks = tempfile::tempdir().unwrap();
    let prefix = ["unshare", "--user", "--map-root-user", "sh", "-c", off, "sh"];
    let missing = both_refuse(&prefix, locks.path().to_str().unwrap());
    let found = "user.max_ipc_namespaces is 0; user.max_net_namespaces is 0";
    // the only id that is mapped is root's
    let ids = "fewer than 9000 ids besides root's are mapped in this user namespace";
    assert_eq!(
        missing,
        [("namespaces", found), ("uids", ids)].map(|(name, found)| (name.to_owned(), found.to_owned()))
    );
}

#[test]
fn a_user_without_privilege_is_told_all_that_root_would_have() {
    let dir = tempfile::tempdir().unwrap();
    // by descriptor, as the user may not be let to where the program is
    let program = fs::File::open(env!("CARGO_BIN_EXE_holm")).unwrap();
    let mut command = command(&[&format!("/proc/self/fd/{}", program.as_raw_fd())]);
    command.args(["serve", "--listen", "127.0.0.1:0", "--data-dir"]).arg(dir.path().join("data"));
    command.uid(65534).gid(65534);
    let all =
        ["cpu, cpuacct, memory, pids, freezer", "CAP_SYS_ADMIN", "/run/holm", "as root", "Delegate=yes", "/etc/subuid"];
    refuse(&dir, command, EX_UNAVAILABLE, &all);
    assert!(!dir.path().join("data").exists());
}
