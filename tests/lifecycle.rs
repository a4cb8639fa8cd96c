//! A server's life: what it keeps of its privileges, how it stops, and what it finds when it starts again.

#![allow(clippy::unwrap_used)] // a test that cannot go on should say where

mod support;

use std::fs;
use std::net::TcpStream;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use holm_sandbox::cgroup::Plan;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use support::inspect::Running;
use support::raw::Raw;
use support::slowness::at_most;
use support::{Answer, OPERATOR, Server, native, wait_until, wasm, wat};

const PROBE: &str = "/v1/tenants/t/plugins/probe/jobs";

/// A server with plugins of both kinds.
fn start_with(config: &str) -> Server {
    let server = Server::start_with(config).with_probe();
    server.upload("t", "echo", &wasm("echo"));
    server
}

/// Waits for the end of a server that was told to stop, and looks for what may be left of it.
#[track_caller]
fn ends_clean(server: &mut Server) {
    let status = server.wait();
    assert!(status.success(), "{status}\n{}", server.log());
    assert!(server.rest_of_stdout().is_empty());
    server.assert_nothing_left();
    assert!(!server.log().contains(" ERROR ") && !server.log().contains("panicked"), "{}", server.log());
}

#[test]
fn an_idle_server_stops_within_a_second_and_takes_its_whole_family_along() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut server = Server::start().with_probe();
        server.assert_healthy();
        let family = [server.launcher(), server.sweeper()];
        let silent = Raw::connect(&server);
        let mut half = Raw::connect(&server);
        half.send(b"GET /healthz HTTP/1.1\r\nHo");
        let begun = Instant::now();
        server.signal(signal);
        ends_clean(&mut server);
        assert!(begun.elapsed() < at_most(Duration::from_secs(1)), "{signal}: {:?}", begun.elapsed());
        assert!(!family.iter().any(|process| process.lives()));
        assert!(TcpStream::connect(server.address()).is_err());
        drop((silent, half));
    }
}

#[test] // without that, they wait for the CPU up to 0.7 s at a time while jobs fork without end
fn r6_server_and_launcher_have_cpu_time_before_all_jobs_and_leave_nothing_of_it() {
    let mut server = Server::start().with_probe();
    let job = Running::start(&server, "t", "probe", &json!(["count"]), &json!({}));
    let v2 = Plan::for_this_process().unwrap().version() == "v2";
    let (file, weights) = if v2 { ("cpu.weight", [3200, 100]) } else { ("cpu.shares", [32_768, 1024]) };
    let instance = job.cgroup_file(&server, file).ancestors().nth(3).unwrap().to_owned();
    let name = instance.file_name().unwrap().to_str().unwrap();
    let own = if v2 { "holm-server".to_owned() } else { format!("server-of-{name}") };
    for process in [server.process(), server.launcher(), server.sweeper()] {
        let cgroup = process.cgroups()["cpu"].clone();
        // the root of all v2 gives nobody a leaf
        assert!(cgroup.ends_with(&format!("/{own}")) || (v2 && cgroup == "/"), "{cgroup}");
    }
    let host = instance.parent().unwrap().join(own);
    let weight = |dir: PathBuf| fs::read_to_string(dir.join(file)).unwrap().trim().parse::<u64>().unwrap();
    if !v2 || host.exists() {
        assert_eq!([weight(host.clone()), weight(instance.join("t"))], weights);
    }
    job.finish().expect(200);
    // whoever dies first, the others are where they came from before their end
    server.launcher().signal(Signal::SIGKILL);
    assert_eq!(server.wait().code(), Some(70));
    wait_until("no cgroup is left", || (server.cgroups().is_empty() && (v2 || !host.exists())).then_some(()));
}

/// Starts a server from a shell that does this before.
fn start_after(line: &str) -> Server {
    let dir = tempfile::tempdir().unwrap();
    let plain = Server::command(&dir, "");
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("{line} && exec \"$@\""), "sh"]).arg(plain.get_program()).args(plain.get_args());
    shell.env("HOLM_OPERATOR_KEY", OPERATOR).stdin(Stdio::null());
    shell.stderr(fs::OpenOptions::new().append(true).open(dir.path().join("log")).unwrap());
    Server::spawn(shell, dir).with_probe()
}

#[test]
fn a_strict_umask_of_the_server_s_is_not_the_jobs() {
    start_after("umask 077").assert_healthy();
}

#[test]
fn an_environment_that_is_no_text_is_nobody_s_concern() {
    start_after(r"export NO_TEXT=$(printf '\377')").assert_healthy();
}

#[test]
fn h1_a_server_that_may_open_few_files_keeps_enough_of_them_for_clients_and_jobs() {
    let server = start_after("ulimit -n 256");
    assert!(server.log().contains("`connections` is 128 and not 4096"), "{}", server.log());
    let idle: Vec<Raw> = (0..200).map(|_| Raw::connect(&server)).collect();
    let mut jobs: Vec<Raw> = (0..20)
        .map(|_| Raw::request(&server, &format!("POST {PROBE}"), &["content-length: 1", "holm-args: [\"count\"]"]))
        .collect();
    // all of them, before any answer is waited for: they need not be served in the order in which they were sent
    jobs.iter_mut().for_each(|job| job.send(b"x"));
    for mut job in jobs {
        job.answered().expect(200);
    }
    drop(idle);
    assert!(!server.log().contains("could not be accepted"), "{}", server.log());
}

#[test]
fn a_server_that_drains_takes_no_jobs_and_lets_those_that_run_end() {
    let mut server = start_with("jobs_running = 2\ndrain_timeout_ms = 60000");
    let native = Running::start(&server, "t", "probe", &json!(["count"]), &json!({}));
    let mut wasm = Running::start(&server, "t", "echo", &json!([]), &json!({}));
    let mut queued = Raw::request(&server, &format!("POST {PROBE}"), &["content-length: 0"]);
    server.wait_for_job("t", "queued");
    server.get("/readyz").expect(200);
    server.signal(Signal::SIGTERM);

    let refused = |answer: &Answer| {
        assert_eq!(answer.problem(503), "draining");
        assert!(answer.header("retry-after").parse::<u32>().unwrap() > 0);
    };
    refused(&queued.answered());
    refused(&server.get("/readyz"));
    refused(&server.operator("POST", PROBE, &[], b""));
    server.get("/healthz").expect(200);
    let shown = server.get(&format!("/v1/jobs/{}", native.id())).expect(200).json();
    assert_eq!(shown["state"], "running");

    assert!(wasm.feed(b"to the last byte"));
    assert_eq!(wasm.finish().expect(200).json()["output"], "to the last byte");
    assert_eq!(native.finish().expect(200).json()["outcome"], json!({"kind": "exited", "exit_code": 0}));
    ends_clean(&mut server);
}

/// A job of each kind that would run for a long time.
fn endless(server: &Server) -> Vec<Running> {
    let start = |plugin: &str, args: Value| Running::start(server, "t", plugin, &args, &json!({"pids": 16}));
    vec![
        start("echo", json!([])),
        start("probe", json!(["count"])),
        start("probe", json!(["spin-in-grandchild", "60000"])),
        start("probe", json!(["fork-bomb", "4"])),
    ]
}

#[test]
fn jobs_that_outlast_the_drain_are_lost_and_their_clients_are_told() {
    let mut server = start_with("drain_timeout_ms = 300");
    let jobs = endless(&server);
    let mut bare = Raw::request(&server, &format!("POST {PROBE}"), &["holm-args: [\"sleep\", \"60000\"]"]);
    wait_until("all five run", || {
        let jobs = server.get("/v1/tenants/t/jobs?state=running").json();
        (jobs["jobs"].as_array().unwrap().iter().filter(|job| job["started_at"].is_string()).count() == 5).then_some(())
    });
    server.signal(Signal::SIGTERM);
    let answer = bare.answered();
    assert_eq!((answer.problem(503).as_str(), answer.header("holm-outcome")), ("lost", "lost"));
    assert_eq!(answer.json()["outcome"], json!({"kind": "lost"}));
    for job in jobs {
        assert_eq!(job.answer().expect(200).json()["outcome"], json!({"kind": "lost"}));
    }
    ends_clean(&mut server);
}

#[test]
fn told_to_stop_again_a_server_ends_what_runs_at_once() {
    for again in [Signal::SIGTERM, Signal::SIGINT] {
        let mut server = start_with("drain_timeout_ms = 3600000");
        let jobs = endless(&server);
        server.signal(Signal::SIGTERM);
        wait_until("it drains", || (server.get("/readyz").status == 503).then_some(()));
        server.signal(again);
        for job in jobs {
            assert_eq!(job.answer().expect(200).json()["outcome"], json!({"kind": "lost"}));
        }
        ends_clean(&mut server);
    }
}

#[test]
fn an_upload_that_is_under_way_is_finished_while_the_server_drains() {
    let mut server = start_with("drain_timeout_ms = 60000");
    let mut upload = Raw::request(&server, "PUT /v1/tenants/t/plugins/slow", &["transfer-encoding: chunked"]);
    assert!(upload.chunk(&wat::slow_to_compile(300)) && upload.chunk(b""));
    let compiler = server.wait_for_compiler();
    compiler.signal(Signal::SIGSTOP);
    server.signal(Signal::SIGTERM);
    wait_until("no new client is served", || TcpStream::connect(server.address()).is_err().then_some(()));
    compiler.signal(Signal::SIGCONT);
    upload.answered().expect(201);
    ends_clean(&mut server);
    let server = Server::start_in(server.take_dir(), "");
    assert_eq!(server.job("t", "slow", &json!([]), &json!({}), b"")["outcome"]["kind"], "exited");
}

#[test]
fn an_upload_that_outlasts_the_drain_is_refused_and_the_old_revision_stays() {
    let mut server = start_with("drain_timeout_ms = 300");
    let before = server.get("/v1/tenants/t/plugins/echo").json();
    let mut upload = Raw::request(&server, "PUT /v1/tenants/t/plugins/echo", &["transfer-encoding: chunked"]);
    assert!(upload.chunk(&wat::slow_to_compile(300)) && upload.chunk(b""));
    let mut cut = Raw::request(&server, "PUT /v1/tenants/t/plugins/echo", &["content-length: 100000"]);
    cut.send(b"\0asm");
    server.wait_for_compiler().signal(Signal::SIGSTOP);
    server.signal(Signal::SIGTERM);
    assert_eq!(upload.answered().problem(503), "draining");
    assert!(cut.answer().is_none(), "its client has not said all yet");
    ends_clean(&mut server);
    let server = Server::start_in(server.take_dir(), "");
    assert_eq!(server.get("/v1/tenants/t/plugins/echo").json(), before);
    assert_eq!(server.job("t", "echo", &json!([]), &json!({}), b"still here")["output"], "still here");
}

#[test]
fn a_data_directory_is_one_server_s_at_a_time() {
    let server = start_with("");
    let job = Running::start(&server, "t", "probe", &json!(["count"]), &json!({}));
    let mut second = Server::command(&server.dir, "");
    let second = second.stdout(Stdio::piped()).stderr(Stdio::piped()).output().unwrap();
    let said = String::from_utf8(second.stderr).unwrap();
    assert_eq!(second.status.code(), Some(69), "{said}");
    assert!(second.stdout.is_empty());
    let data = server.data().canonicalize().unwrap();
    for words in [&*data.to_string_lossy(), "is in use by another server", "--data-dir"] {
        assert!(said.contains(words), "{said}");
    }
    assert_eq!(job.finish().expect(200).json()["outcome"]["kind"], "exited");
    server.assert_healthy();
    let dir = server.stop();
    Server::start_in(dir, "").assert_healthy();
}

#[test]
fn everything_but_the_records_is_there_after_a_restart() {
    let server = start_with("");
    server.tenant("acme", &json!({"quota": {"jobs_running": 3}, "job_defaults": {"pids": 9}}));
    server.upload("acme", "words", &native("word-count"));
    server.patch_json("/v1/tenants/t/plugins/echo", &json!({"limits": {"fuel": 123_456_789}})).expect(200);
    let key = server.key("t");
    let job = server.job("t", "echo", &json!([]), &json!({}), b"x");
    let compiled = || {
        let engine = server.data().join("compiled").read_dir().unwrap().next().unwrap().unwrap().path();
        let file = engine.join("t").read_dir().unwrap().next().unwrap().unwrap().path();
        let metadata = file.metadata().unwrap();
        (file, metadata.ino(), metadata.mtime_nsec())
    };
    let paths = ["/v1/tenants", "/v1/tenants/acme", "/v1/tenants/t/plugins", "/v1/tenants/acme/plugins"];
    let look = |server: &Server| paths.map(|path| server.get(path).expect(200).json());
    let (before, built) = (look(&server), compiled());
    let server = Server::start_in(server.stop(), "");

    assert_eq!(look(&server), before);
    let words = json!(["exit", "0"]).to_string();
    server.send(&key, "POST", PROBE, &[("holm-args", &words)], b"").expect(200);
    let again = server.job("t", "echo", &json!([]), &json!({}), b"x");
    assert_eq!((&again["output"], &again["outcome"]["kind"]), (&json!("x"), &json!("exited")));
    assert_eq!(again["usage"]["fuel_used"], job["usage"]["fuel_used"]);
    let file = server.data().join("compiled").join(built.0.strip_prefix(built.0.ancestors().nth(3).unwrap()).unwrap());
    let metadata = file.metadata().unwrap();
    assert_eq!((metadata.ino(), metadata.mtime_nsec()), (built.1, built.2), "it was not compiled again");
    server.get(&format!("/v1/jobs/{}", job["id"].as_str().unwrap())).problem(404);
}

#[test]
fn the_server_is_a_user_without_capabilities_in_a_directory_that_is_its_own() {
    let server = start_with("user = 'nobody'");
    server.assert_healthy();
    let status = server.process().status();
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(u64::from_str_radix(&status[set], 16), Ok(0), "{set}");
    }
    let uid = fs::metadata(server.data()).unwrap().uid();
    assert_ne!(uid, 0);
    assert_eq!(status["Uid"].split_whitespace().collect::<Vec<_>>(), [uid.to_string().as_str(); 4]);
    assert_eq!((status["Groups"].as_str(), status["NoNewPrivs"].as_str()), ("", "1"));
    assert_eq!(server.process().proc_owner(), 0, "nobody may look into it");
    let data = fs::metadata(server.data()).unwrap();
    assert_eq!(data.permissions().mode() & 0o777, 0o700);
}

#[test]
fn a_data_directory_that_others_may_enter_has_nothing_that_they_can_read() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("data")).unwrap();
    fs::set_permissions(dir.path().join("data"), fs::Permissions::from_mode(0o755)).unwrap();
    let server = Server::start_in(dir, "");
    server.tenant("t", &json!({}));
    server.upload("t", "p", &wasm("echo"));
    let modes: Vec<_> = fs::read_dir(server.data())
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name(), entry.metadata().unwrap().permissions().mode() & 0o777))
        .collect();
    assert!(modes.iter().any(|(name, _)| name == "holm.db-wal"), "{modes:?}");
    assert!(modes.iter().all(|(_, mode)| mode & 0o77 == 0), "{modes:?}");
}

#[test]
fn the_server_cannot_open_what_is_outside_of_its_data_directory() {
    let server = start_with("");
    server.upload("t", "p", &native("echo"));
    let revision = server.get("/v1/tenants/t/plugins/p").json()["revision"].as_str().unwrap().to_owned();
    let artifact = server.data().join("artifacts/t").join(revision.strip_prefix("sha256:").unwrap());
    let run = || server.operator("POST", "/v1/tenants/t/plugins/p/jobs", &[], b"hello");
    for (place, status) in [(server.data().join("elsewhere"), 200), (server.dir.path().join("outside"), 500)] {
        fs::rename(&artifact, &place).unwrap();
        symlink(&place, &artifact).unwrap();
        assert_eq!(run().status, status, "{}", place.display());
        fs::rename(&place, &artifact).unwrap();
    }
    assert_eq!(run().expect(200).text(), "hello");
    assert!(server.log().contains("Permission denied"), "{}", server.log());
}
