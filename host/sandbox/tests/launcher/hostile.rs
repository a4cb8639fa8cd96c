//! A server that was taken over: nonsense on the launcher's socket is answered with an error or ends the launcher in
//! order, its sandboxes with it. It never panics, and leaves nothing.

use std::io::{IoSlice, pipe};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::Duration;

use holm_sandbox::limits::{Ceiling, Limits};
use holm_sandbox::protocol::{FromLauncher, ToLauncher, VERSION};
use holm_sandbox::spec::{Kind, SandboxId, SandboxSpec};
use holm_sandbox::usage::{Exit, KillCause};
use holm_sandbox::wire::{MAX_PACKET, Packets};
use holm_sandbox::{LaunchError, Step};
use libtest_mimic::Trial;
use nix::errno::Errno::{self, *};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use crate::client::{Client, artifact, config, limits, spec};
use crate::slowness::at_most;
use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial("ids_that_do_not_exist_are_ignored", unknown_ids),
        trial("an_id_in_use_or_out_of_range_is_refused_and_its_owner_goes_on", ids_in_use),
        trial("limits_out_of_range_are_refused_at_check_spec", limits_out_of_range),
        trial("limits_at_their_least_and_most_launch", limits_in_range),
        trial("ceilings_at_their_extremes_are_set_or_refused", ceilings),
        trial("descriptors_of_the_wrong_type_fail_only_their_sandbox", wrong_descriptors),
        trial("a_program_that_shrinks_while_it_is_copied_is_refused", a_shrinking_program),
        trial("another_version_of_the_protocol_is_refused", another_version),
    ];
    for (name, bytes, fds) in nonsense() {
        let name = format!("{name}_ends_the_launcher_in_order");
        trials.push(trial(&name, move || ends_all(&bytes, fds)));
    }
    trials
}

/// Packets that no server sends: what they are, their bytes, and how many descriptors come with them.
fn nonsense() -> Vec<(String, Vec<u8>, usize)> {
    let encoded = |message: &ToLauncher| postcard::to_stdvec(message).unwrap();
    let launch = encoded(&ToLauncher::Launch { id: SandboxId(7), spec: spec(Kind::Native) });
    let config = config("another".parse().unwrap(), Path::new("/"));
    let mut packets = vec![
        ("an_empty_packet".to_owned(), vec![], 0),
        ("an_empty_packet_with_descriptors".to_owned(), vec![], 2),
        ("garbage".to_owned(), vec![0xff; 64], 0),
        ("zeros".to_owned(), vec![0; 4096], 0),
        ("an_oversized_packet".to_owned(), vec![1; MAX_PACKET + 1], 0),
        ("an_oversized_packet_that_begins_well".to_owned(), [launch.clone(), vec![0; MAX_PACKET]].concat(), 2),
        ("half_a_launch".to_owned(), launch[..launch.len() / 2].to_vec(), 2),
        ("a_launch_and_a_half".to_owned(), [launch.clone(), launch[..9].to_vec()].concat(), 2),
        ("a_second_configuration".to_owned(), encoded(&ToLauncher::Configure(config)), 0),
        ("a_kill_with_a_descriptor".to_owned(), encoded(&ToLauncher::Kill(SandboxId(1))), 1),
    ];
    for fds in [0, 1, 3, 4, 100] {
        packets.push((format!("a_launch_with_{fds}_descriptors"), launch.clone(), fds));
    }
    let long = "x".repeat(64);
    let names = [
        ("with_a_slash", "a/b"),
        ("of_two_dots", ".."),
        ("of_one_dot", "."),
        ("with_a_nul", "a\0b"),
        ("with_a_newline", "a\nb"),
        ("that_is_empty", ""),
        ("that_is_too_long", &long),
    ];
    for (what, name) in names {
        packets.push((format!("a_tenant_s_name_{what}"), renamed(&launch, "acme", name), 2));
        packets.push((format!("a_program_s_name_{what}"), renamed(&launch, "action", name), 2));
    }
    packets
}

/// The encoded message with another string in place of `from`; a string is its length and its bytes.
fn renamed(message: &[u8], from: &str, to: &str) -> Vec<u8> {
    let (from, to) = (postcard::to_stdvec(from).unwrap(), postcard::to_stdvec(to).unwrap());
    let at = message.windows(from.len()).position(|window| window == from).unwrap();
    [&message[..at], &to, &message[at + from.len()..]].concat()
}

/// The sandboxes of a server that talks nonsense end with the launcher; that leaves nothing, not even of a job.
fn ends_all(bytes: &[u8], fds: usize) {
    let mut client = Client::start();
    let _parked = client.park(spec(Kind::Wasm));
    let _entering = client.launch(spec(Kind::Native));
    send_raw(&client, bytes, fds);
    client.must_end();
}

fn send_raw(client: &Client, bytes: &[u8], fds: usize) {
    let file = artifact();
    let raw: Vec<RawFd> = vec![file.as_raw_fd(); fds];
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if fds == 0 { &[][..] } else { &rights[..] };
    sendmsg::<()>(client.socket().as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None).unwrap();
}

fn unknown_ids() {
    let mut client = Client::start();
    let (parked, isolation) = client.park(spec(Kind::Native));
    let tenant = "nobody".parse().unwrap();
    let ceiling = Ceiling { pids: Some(1), ..Ceiling::default() };
    assert!(client.set_ceiling(tenant, ceiling).is_err(), "out of its range");
    client.send(&ToLauncher::ForgetTenant("nobody".parse().unwrap()));
    let (tenant, program) = ("nobody".parse().unwrap(), "nothing".parse().unwrap());
    client.send(&ToLauncher::ForgetProgram { tenant, program });
    for id in [0, 99, u64::MAX >> 3, u64::MAX] {
        client.send(&ToLauncher::Kill(SandboxId(id)));
    }
    assert_eq!(client.finish(&parked, isolation, "mark").stdout, "ran\n");
    client.send(&ToLauncher::Kill(parked.id)); // it existed
    assert_eq!(client.run(spec(Kind::Native), "mark").stdout, "ran\n");
    client.end();
}

fn ids_in_use() {
    const INVALID: LaunchError = LaunchError { step: Step::CheckSpec, errno: EINVAL as i32 };
    let mut client = Client::start();
    let (parked, isolation) = client.park(spec(Kind::Wasm));
    let before = client.instance.sandboxes();
    for id in [parked.id, SandboxId((u64::MAX >> 3) + 1), SandboxId(u64::MAX)] {
        client.launch_as(id, spec(Kind::Wasm));
        assert_eq!(client.refused(id), INVALID);
    }
    assert_eq!(client.instance.sandboxes(), before);
    assert_eq!(client.finish(&parked, isolation, "mark").stdout, "ran\n");
    let highest = SandboxId(u64::MAX >> 3);
    let launched = client.launch_as(highest, spec(Kind::Wasm));
    let isolation = client.ready(highest);
    assert_eq!(client.finish(&launched, isolation, "mark").stdout, "ran\n");
    client.end();
}

fn limits_out_of_range() {
    type Set = fn(&mut Limits);
    let sets: [Set; 20] = [
        |l| l.memory_bytes = Limits::MEMORY_BYTES.start() - 1,
        |l| l.memory_bytes = u64::MAX,
        |l| l.cpu_millicores = Limits::CPU_MILLICORES.start() - 1,
        |l| l.cpu_millicores = u32::MAX,
        |l| l.cpu_weight = 0,
        |l| l.cpu_weight = u32::MAX,
        |l| l.cpu_time = Duration::ZERO,
        |l| l.cpu_time = Duration::MAX,
        |l| l.wall_time = Duration::ZERO,
        |l| l.wall_time = Duration::MAX,
        |l| l.pids = 0,
        |l| l.pids = u32::MAX,
        |l| l.scratch_bytes = 0,
        |l| l.scratch_bytes = u64::MAX,
        |l| l.scratch_inodes = 0,
        |l| l.scratch_inodes = u64::MAX,
        |l| l.open_files = 0,
        |l| l.open_files = u32::MAX,
        |l| l.stack_bytes = 0,
        |l| l.stack_bytes = u64::MAX,
    ];
    let mut client = Client::start();
    for set in sets {
        let mut limits = limits();
        set(&mut limits);
        let launched = client.launch(SandboxSpec { limits, ..spec(Kind::Native) });
        let error = client.refused(launched.id);
        assert_eq!(error, LaunchError { step: Step::CheckSpec, errno: EINVAL as i32 }, "{limits:?}");
    }
    assert!(client.instance.sandboxes().is_empty());
    client.end();
}

fn limits_in_range() {
    let least = Limits {
        memory_bytes: *Limits::MEMORY_BYTES.start(),
        cpu_millicores: 1000, // the least would take the launch seconds
        cpu_weight: *Limits::CPU_WEIGHT.start(),
        cpu_time: at_most(*Limits::TIME.start()), // the launch takes most of it
        wall_time: *Limits::TIME.end(),
        pids: *Limits::PIDS.start(),
        scratch_bytes: *Limits::SCRATCH_BYTES.start(),
        scratch_inodes: *Limits::SCRATCH_INODES.start(),
        open_files: *Limits::OPEN_FILES.start(),
        stack_bytes: *Limits::STACK_BYTES.start(),
    };
    let most = Limits {
        memory_bytes: *Limits::MEMORY_BYTES.end(),
        cpu_millicores: *Limits::CPU_MILLICORES.end(),
        cpu_weight: *Limits::CPU_WEIGHT.end(),
        cpu_time: *Limits::TIME.end(),
        wall_time: *Limits::TIME.end(),
        pids: *Limits::PIDS.end(),
        scratch_bytes: *Limits::SCRATCH_BYTES.end(),
        scratch_inodes: *Limits::SCRATCH_INODES.end(),
        open_files: *Limits::OPEN_FILES.end(),
        stack_bytes: *Limits::STACK_BYTES.end(),
    };
    let mut client = Client::start();
    for kind in Kind::ALL {
        for limits in [least, most] {
            assert_eq!(client.run(SandboxSpec { limits, ..spec(kind) }, "mark").stdout, "ran\n", "{kind:?} {limits:?}");
        }
    }
    client.end();
}

fn ceilings() {
    type Set = fn(&mut Ceiling);
    let refused: [Set; 8] = [
        |ceiling| ceiling.memory_bytes = Some(u64::MAX),
        |ceiling| ceiling.memory_bytes = Some(0),
        |ceiling| ceiling.cpu_millicores = Some(0),
        |ceiling| ceiling.cpu_millicores = Some(u32::MAX),
        |ceiling| ceiling.cpu_weight = Some(0),
        |ceiling| ceiling.cpu_weight = Some(u32::MAX),
        |ceiling| ceiling.pids = Some(0),
        |ceiling| ceiling.pids = Some(u32::MAX),
    ];
    let taken: [Set; 3] = [
        |ceiling| ceiling.memory_bytes = Some(*Ceiling::MEMORY_BYTES.end()),
        |ceiling| ceiling.cpu_weight = Some(*Limits::CPU_WEIGHT.end()),
        |_| {},
    ];
    let made = |set: Set| {
        let mut ceiling = Ceiling::default();
        set(&mut ceiling);
        ceiling
    };
    let mut client = Client::start();
    for ceiling in refused.map(made) {
        assert!(client.set_ceiling("acme".parse().unwrap(), ceiling.clone()).is_err(), "{ceiling:?}");
        let launched = client.launch(SandboxSpec { ceiling: ceiling.clone(), ..spec(Kind::Native) });
        let error = LaunchError { step: Step::CheckSpec, errno: EINVAL as i32 };
        assert_eq!(client.refused(launched.id), error, "{ceiling:?}");
    }
    for ceiling in taken.map(made) {
        assert_eq!(client.set_ceiling("acme".parse().unwrap(), ceiling.clone()), Ok(()), "{ceiling:?}");
        let spec = SandboxSpec { ceiling: ceiling.clone(), ..spec(Kind::Native) };
        assert_eq!(client.run(spec, "mark").stdout, "ran\n", "{ceiling:?}");
    }
    client.end();
}

fn wrong_descriptors() {
    let mut client = Client::start();
    let good_channel = || OwnedFd::from(Packets::pair().unwrap().0);
    let artifacts: [(OwnedFd, Errno); 4] = [
        (pipe().unwrap().0.into(), EINVAL),
        (std::fs::File::open("/").unwrap().into(), EINVAL),
        (std::fs::File::open("/dev/zero").unwrap().into(), EINVAL),
        (good_channel(), EINVAL),
    ];
    for (artifact, errno) in artifacts {
        let id = client.new_id();
        client
            .socket()
            .send(&ToLauncher::Launch { id, spec: spec(Kind::Native) }, &[good_channel(), artifact])
            .unwrap();
        assert_eq!(client.refused(id), LaunchError { step: Step::CopyProgram, errno: errno as i32 });
    }
    for kind in Kind::ALL {
        // a channel that is none takes no job: it was ready, and then is refused
        let id = client.new_id();
        client.socket().send(&ToLauncher::Launch { id, spec: spec(kind) }, &[artifact(), artifact()]).unwrap();
        client.ready(id);
        assert_eq!(client.refused(id), LaunchError { step: Step::ReceiveJob, errno: EPROTO as i32 });
    }
    // a server that has gone away from a sandbox's channel: the same
    let (launched, _) = client.park(spec(Kind::Wasm));
    drop(launched.channel);
    assert_eq!(client.refused(launched.id), LaunchError { step: Step::ReceiveJob, errno: EPROTO as i32 });
    assert_eq!(client.run(spec(Kind::Native), "mark").stdout, "ran\n");
    client.end();
}

/// The server keeps the file, and may cut it while it is copied; a sparse one is longer than the job's memory.
fn a_shrinking_program() {
    let mut client = Client::start();
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 40).unwrap();
    let id = client.new_id();
    let fds: [OwnedFd; 2] = [Packets::pair().unwrap().0.into(), file.try_clone().unwrap().into()];
    client.socket().send(&ToLauncher::Launch { id, spec: spec(Kind::Native) }, &fds).unwrap();
    file.set_len(1).unwrap();
    match client.recv() {
        FromLauncher::Refused { error, .. } => assert_eq!(error.step, Step::CopyProgram),
        FromLauncher::Ended { report, .. } => {
            let end = (report.exit, report.killed, report.started);
            assert_eq!(end, (Exit::Signaled(libc::SIGKILL), Some(KillCause::Memory), false));
        }
        // cut before it was measured: it is a program of one byte
        FromLauncher::Ready { .. } => client.send(&ToLauncher::Kill(id)),
        other => panic!("{other:?}"),
    }
    client.end();
}

fn another_version() {
    let problems = Client::start_with_version(VERSION + 1).unwrap_err();
    assert_eq!(
        problems,
        [format!("the server speaks version {} of the launcher's protocol, not {VERSION}", VERSION + 1)]
    );
}
