//! What zygotes owe, and hold, while their tenant is frozen, limited anew or deleted.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use holm_sandbox::limits::Ceiling;
use holm_sandbox::protocol::{Answer, FromLauncher, Order, OrderError, ToLauncher};
use holm_sandbox::spec::{Kind, SandboxId};
use holm_sandbox::usage::{KillCause, SandboxReport};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};

use crate::client::{Client, Launched, spec, wait_until};
use crate::faults::zygote;
use crate::slowness::at_most;
use crate::trial;
use crate::zygotes::zygotes;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("what_a_frozen_tenant_s_zygote_owes_can_be_killed_and_comes_when_it_is_thawed", owed_while_frozen),
        trial("what_is_killed_before_its_zygote_is_frozen_ends_at_once", || cloned_and_killed(false)),
        trial("what_is_killed_after_its_zygote_is_frozen_ends_at_once", || cloned_and_killed(true)),
        trial("a_frozen_zygote_that_is_killed_is_replaced_by_one_that_stands_still_too", killed_while_frozen),
        trial("a_tenant_deleted_while_frozen_leaves_nothing_of_its_zygotes", deleted_while_frozen),
        trial("orders_for_what_a_zygote_owes_are_answered_so", orders_for_what_is_owed),
        trial("a_zygote_has_as_much_cpu_as_its_tenant_when_that_has_more", more_cpu),
    ]
}

fn owed_while_frozen() {
    for zygote_is_there in [false, true] {
        let mut client = Client::start();
        if zygote_is_there {
            client.run(spec(Kind::Wasm), "mark");
        }
        assert_eq!(client.freeze_tenant(true), Ok(Answer::Done));
        let [killed, stays] = [(); 2].map(|()| client.launch(spec(Kind::Wasm)));
        std::thread::sleep(Duration::from_millis(50));
        let since = Instant::now();
        client.send(&ToLauncher::Kill(killed.id));
        was_killed(&client.ended(killed.id), since);
        assert_eq!(client.freeze_tenant(false), Ok(Answer::Done));
        let isolation = client.ready(stays.id);
        assert_eq!(client.finish(&stays, isolation, "mark").stdout, "ran\n");
        client.end();
    }
}

/// A zygote has cloned a sandbox and not told of it, when its tenant is frozen and the sandbox killed, in either order.
fn cloned_and_killed(frozen_first: bool) {
    let mut client = Client::start_under(&[zygote(libc::SYS_sendmsg)]);
    let killed = owed_by_a_hung_zygote(&mut client);
    let stays = client.launch(spec(Kind::Wasm));
    let hung = zygotes(&client);
    let freeze = |client: &mut Client| {
        let request = client.new_id().0;
        client.send(&ToLauncher::FreezeTenant { request, tenant: "acme".parse().unwrap(), frozen: true });
        request
    };
    let since = Instant::now();
    let mut report = None;
    if frozen_first {
        let request = freeze(&mut client);
        assert_eq!(client.answer(request), Ok(Answer::Done));
        client.send(&ToLauncher::Kill(killed.id));
        report = Some(client.ended(killed.id));
    } else {
        client.send(&ToLauncher::Kill(killed.id));
        let frozen = freeze(&mut client);
        for _ in 0..2 {
            match client.recv() {
                FromLauncher::Answer { request, result } if request == frozen => assert_eq!(result, Ok(Answer::Done)),
                FromLauncher::Ended { id, report: told } if id == killed.id => report = Some(told),
                other => panic!("{other:?}"),
            }
        }
    }
    was_killed(&report.unwrap(), since);
    // what it had cloned is gone with it, though its tenant stands still
    wait_until("the zygote's cgroup is removed", || leaves(&client, "zygote-").len() == 1);
    wait_until("there is one other", || zygotes(&client).len() == 1 && zygotes(&client) != hung);
    wait_until("the dead are reaped", || zombies(&client) == 0);

    assert_eq!(client.freeze_tenant(false), Ok(Answer::Done));
    let isolation = client.ready(stays.id);
    assert_eq!(client.finish(&stays, isolation, "mark").stdout, "ran\n");
    client.held();
    wait_until("the dead are reaped", || zombies(&client) == 0);
    client.end();
}

fn killed_while_frozen() {
    let mut client = Client::start();
    let (parked, isolation) = client.park(spec(Kind::Wasm));
    let [first] = zygotes(&client)[..] else { panic!("{:?}", zygotes(&client)) };
    assert_eq!(client.freeze_tenant(true), Ok(Answer::Done));
    let owed = client.launch(spec(Kind::Wasm));
    kill(first, Signal::SIGKILL).unwrap();
    // v1 lets it die when it goes on
    let dies = crate::left::has_v2();
    if dies {
        wait_until("there is another", || zygotes(&client).len() == 1 && zygotes(&client) != [first]);
    }
    let before = client.measure(parked.id);
    assert_eq!(client.measure(parked.id).usage, before.usage, "it stands still as before");
    assert_eq!(client.freeze_tenant(false), Ok(Answer::Done));
    let owed_isolation = client.ready(owed.id);
    for (launched, isolation) in [(owed, owed_isolation), (parked, isolation)] {
        assert_eq!(client.finish(&launched, isolation, "mark").stdout, "ran\n");
    }
    client.held();
    wait_until("the dead are reaped", || zombies(&client) == 0);
    client.end();
}

fn deleted_while_frozen() {
    for cloned in [false, true] {
        let mut client = Client::start_under(&[zygote(libc::SYS_sendmsg)]);
        let owed = if cloned {
            let owed = [owed_by_a_hung_zygote(&mut client), client.launch(spec(Kind::Wasm))];
            assert_eq!(client.freeze_tenant(true), Ok(Answer::Done));
            owed
        } else {
            client.run(spec(Kind::Wasm), "mark");
            assert_eq!(client.freeze_tenant(true), Ok(Answer::Done));
            [(); 2].map(|()| client.launch(spec(Kind::Wasm)))
        };
        // as the server does it
        let since = Instant::now();
        for launched in &owed {
            client.send(&ToLauncher::Kill(launched.id));
        }
        client.send(&ToLauncher::ForgetTenant("acme".parse().unwrap()));
        let mut ended: Vec<SandboxId> = Vec::new();
        for _ in &owed {
            let FromLauncher::Ended { id, report } = client.recv() else { panic!("not ended") };
            was_killed(&report, since);
            ended.push(id);
        }
        ended.sort_unstable();
        assert_eq!(ended, owed.each_ref().map(|launched| launched.id));
        for name in ["zygote-", "family-", "sandbox-"] {
            wait_until("nothing of it is left", || leaves(&client, name).is_empty());
        }
        wait_until("nobody is left", || zygotes(&client).is_empty() && zombies(&client) == 0);
        // the next of its name is not frozen
        assert_eq!(client.run(spec(Kind::Wasm), "mark").stdout, "ran\n");
        client.end();
    }
}

/// What is not there yet can be given no orders but to be killed; whoever gives them waits until it is ready.
fn orders_for_what_is_owed() {
    let mut client = Client::start_under(&[zygote(libc::SYS_sendmsg)]);
    let owed = owed_by_a_hung_zygote(&mut client);
    for order in [Order::Freeze, Order::Thaw, Order::Limit(crate::client::limits()), Order::Measure, Order::List] {
        assert_eq!(client.ask(owed.id, order), Err(OrderError::Ended));
    }
    // it goes on when it is frozen for a moment, and tells then
    assert_eq!(client.freeze_tenant(true), Ok(Answer::Done));
    assert_eq!(client.freeze_tenant(false), Ok(Answer::Done));
    let isolation = client.ready(owed.id);
    assert_eq!(client.finish(&owed, isolation, "mark").stdout, "ran\n");
    client.end();
}

/// While its tenant has little of the CPU a zygote has little too, and not for longer.
fn more_cpu() {
    let mut client = Client::start();
    // on a slow machine what makes sandboxes takes as many times more, and is given that
    let millicores = 10 * u32::try_from(at_most(Duration::from_secs(1)).as_secs()).unwrap();
    let little = Ceiling { cpu_millicores: Some(millicores), ..Ceiling::default() };
    assert_eq!(client.set_ceiling("acme".parse().unwrap(), little), Ok(()));
    client.run(spec(Kind::Wasm), "mark");
    wait_until("it has been throttled", || {
        client.run(spec(Kind::Wasm), "mark");
        throttled(&client, "zygote-") > 0
    });
    assert_eq!(client.set_ceiling("acme".parse().unwrap(), Ceiling::default()), Ok(()));
    // what it has used up of the last period of little is over in the next
    std::thread::sleep(Duration::from_millis(300));
    let before = throttled(&client, "zygote-");
    for _ in 0..20 {
        client.run(spec(Kind::Wasm), "mark");
    }
    assert_eq!(throttled(&client, "zygote-"), before);
    client.end();
}

/// A sandbox that its zygote has cloned, and hangs before it tells of it. It tells when it has been frozen and goes on
/// again.
fn owed_by_a_hung_zygote(client: &mut Client) -> Launched {
    client.run(spec(Kind::Wasm), "mark");
    client.arm(&[zygote(libc::SYS_sendmsg).hangs()]);
    let owed = client.launch(spec(Kind::Wasm));
    wait_until("the zygote tells of what it has cloned", || client.struck() > 0);
    client.disarm();
    owed
}

fn was_killed(report: &SandboxReport, since: Instant) {
    assert_eq!((report.started, report.killed), (false, Some(KillCause::Requested)));
    assert!(since.elapsed() < at_most(Duration::from_secs(1)), "{:?}", since.elapsed());
}

/// The cgroups of this kind below tenants', in any hierarchy, by their names.
fn leaves(client: &Client, kind: &str) -> BTreeMap<String, Vec<PathBuf>> {
    let mut leaves: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    for leaf in client.instance.cgroups.iter().flat_map(|cgroup| below(cgroup)).flat_map(|tenant| below(&tenant)) {
        let name = leaf.file_name().unwrap().to_str().unwrap();
        if name.starts_with(kind) {
            leaves.entry(name.to_owned()).or_default().push(leaf);
        }
    }
    leaves
}

fn below(cgroup: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(cgroup).into_iter().flatten();
    entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path.is_dir()).collect()
}

/// How often the only cgroup of this kind has been kept from the CPU.
fn throttled(client: &Client, kind: &str) -> u64 {
    let leaves = leaves(client, kind);
    assert_eq!(leaves.len(), 1, "{leaves:?}");
    let stats = leaves.values().flatten().filter_map(|leaf| fs::read_to_string(leaf.join("cpu.stat")).ok());
    let counts =
        stats.filter_map(|stat| stat.lines().find_map(|line| line.strip_prefix("nr_throttled ")?.parse().ok()));
    counts.max().expect("some hierarchy limits the CPU")
}

/// Dead children that the launcher has not reaped.
fn zombies(client: &Client) -> usize {
    let launcher = client.child.id();
    let children = fs::read_to_string(format!("/proc/{launcher}/task/{launcher}/children")).unwrap();
    let is_dead = |pid: &&str| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.lines().any(|line| line.starts_with("State:\tZ"))
    };
    children.split_whitespace().filter(is_dead).count()
}
