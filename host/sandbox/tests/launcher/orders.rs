//! Orders for sandboxes that live: freezing, thawing, other limits, measuring, listing; and orders that make no sense.

use std::process::Command;
use std::time::{Duration, Instant};

use holm_sandbox::limits::{Ceiling, Limits};
use holm_sandbox::protocol::{Answer, FromLauncher, Order, OrderError, PROCESSES_AT_ONCE, ToLauncher};
use holm_sandbox::spec::{Kind, SandboxId, SandboxSpec};
use holm_sandbox::usage::{Exit, KillCause, ProcessInfo, Stats};
use libtest_mimic::Trial;

use crate::client::{Client, Launched, give, limits, spec, wait_until};
use crate::slowness::at_most;
use crate::{left, trial};

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial("nothing_of_a_frozen_sandbox_runs_and_its_wall_clock_stands", frozen),
        trial("a_frozen_sandbox_can_be_killed_within_a_second", killed_while_frozen),
        trial("a_frozen_tenant_s_sandboxes_stand_still_those_to_come_included", frozen_tenant),
        trial("an_order_of_its_own_outlasts_the_tenant_s_freeze", frozen_twice),
        trial("a_tenant_without_sandboxes_can_be_frozen_and_deleted", frozen_without_sandboxes),
        trial("frozen_sandboxes_end_with_their_launcher", ends_frozen),
        trial("what_is_frozen_from_its_birth_on_keeps_nothing_of_others", frozen_from_birth),
        trial("limits_change_while_it_runs_and_end_it_if_it_has_passed_them", changed_limits),
        trial("limits_that_cannot_be_changed_are_refused_by_name", unchangeable_limits),
        trial("a_sandbox_s_processes_are_told_all_and_its_own_alone", processes),
        trial("orders_for_what_is_not_there_are_answered_so", nothing_there),
        trial("the_second_order_overtakes_the_first", overtaken),
    ];
    if left::hierarchies() > 1 && left::has_v2() {
        trials.push(trial("without_the_v2_hierarchy_the_freezer_of_v1_does_the_same", with_v1_alone));
    }
    trials
}

/// Runs the trials of freezing once more where no v2 hierarchy is to be seen.
fn with_v1_alone() {
    const NARROWED: &str = "umount $(sed -n 's/^[^ ]* \\([^ ]*\\) cgroup2 .*/\\1/p' /proc/mounts) && exec \"$@\"";
    let own = std::env::current_exe().unwrap();
    for filter in ["frozen", "overtakes"] {
        let output = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c", NARROWED, "sh"])
            .arg(&own)
            .arg(filter)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && !said.contains(" 0 passed"), "{said}");
    }
}

impl Client {
    pub(crate) fn order(&mut self, id: SandboxId, order: Order) -> u64 {
        let request = self.new_id().0;
        self.send(&ToLauncher::Order { request, id, order });
        request
    }

    /// The next message, which must answer this request.
    #[track_caller]
    pub(crate) fn answer(&self, request: u64) -> Result<Answer, OrderError> {
        match self.recv() {
            FromLauncher::Answer { request: answered, result } if answered == request => result,
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    pub(crate) fn ask(&mut self, id: SandboxId, order: Order) -> Result<Answer, OrderError> {
        let request = self.order(id, order);
        self.answer(request)
    }

    #[track_caller]
    pub(crate) fn freeze_tenant(&mut self, frozen: bool) -> Result<Answer, OrderError> {
        let request = self.new_id().0;
        self.send(&ToLauncher::FreezeTenant { request, tenant: "acme".parse().unwrap(), frozen });
        self.answer(request)
    }

    #[track_caller]
    pub(crate) fn measure(&mut self, id: SandboxId) -> Stats {
        match self.ask(id, Order::Measure) {
            Ok(Answer::Stats(stats)) => *stats,
            other => panic!("{other:?}"),
        }
    }

    /// The CPU time that the launcher has had, in hundredths of a second.
    fn cpu_ticks(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        fields[11..13].iter().map(|ticks| ticks.parse::<u64>().unwrap()).sum()
    }

    /// A sandbox in which tenant code spins, deaf to signals.
    fn spinning(&mut self, spec: SandboxSpec) -> Launched {
        let (launched, _) = self.park(spec);
        drop(give(&launched.channel, "spin deaf"));
        assert_eq!(self.recv(), FromLauncher::Started(launched.id));
        launched
    }
}

fn cpu(stats: &Stats) -> u64 {
    stats.usage.cpu_user_us.unwrap() + stats.usage.cpu_system_us.unwrap()
}

fn frozen() {
    let mut client = Client::start();
    for kind in [Kind::Native, Kind::Wasm] {
        let wall_time = Duration::from_millis(900);
        let Launched { id, .. } =
            client.spinning(SandboxSpec { limits: Limits { wall_time, ..limits() }, ..spec(kind) });
        assert_eq!(client.ask(id, Order::Freeze), Ok(Answer::Done));
        let before = client.measure(id);
        // longer than it may run
        std::thread::sleep(Duration::from_millis(1000));
        assert_eq!(client.ask(id, Order::Freeze), Ok(Answer::Done), "it is frozen");
        let after = client.measure(id);
        assert_eq!(cpu(&before), cpu(&after), "{kind:?}");
        assert_eq!(before.usage.wall_us, after.usage.wall_us, "{kind:?}");
        assert!(after.usage.paused_us - before.usage.paused_us >= 1_000_000, "{kind:?}: {after:?}");
        assert_eq!(client.ask(id, Order::Thaw), Ok(Answer::Done));
        let report = client.ended(id);
        assert_eq!(
            (report.exit, report.killed),
            (Exit::Signaled(libc::SIGKILL), Some(KillCause::WallTime)),
            "{kind:?}"
        );
        assert!(report.usage.wall_us >= 900_000 && cpu(&Stats { usage: report.usage, ..after }) > cpu(&after));
        assert!(report.usage.paused_us >= 1_000_000);
    }
    client.held();
    client.end();
}

fn killed_while_frozen() {
    let mut client = Client::start();
    for kind in Kind::ALL {
        client.run(spec(kind), "mark");
    }
    let before = client.held();
    for by_tenant in [false, true] {
        for kind in Kind::ALL {
            let Launched { id, .. } = client.spinning(spec(kind));
            let frozen = if by_tenant { client.freeze_tenant(true) } else { client.ask(id, Order::Freeze) };
            assert_eq!(frozen, Ok(Answer::Done));
            let begun = Instant::now();
            client.send(&ToLauncher::Kill(id));
            let report = client.ended(id);
            assert!(begun.elapsed() < at_most(Duration::from_secs(1)), "{kind:?}: {:?}", begun.elapsed());
            assert_eq!((report.killed, report.started), (Some(KillCause::Requested), true), "{kind:?}");
            if by_tenant {
                assert_eq!(client.freeze_tenant(false), Ok(Answer::Done));
            }
        }
    }
    client.must_hold(&before);
    client.end();
}

fn frozen_tenant() {
    let mut client = Client::start();
    let [first, second] = [Kind::Native, Kind::Wasm].map(|kind| client.spinning(spec(kind)));
    let (parked, isolation) = client.park(spec(Kind::Native));
    assert_eq!(client.freeze_tenant(true), Ok(Answer::Done));
    let before = [&first, &second].map(|launched| client.measure(launched.id));
    let newborn = client.launch(spec(Kind::Native));
    let neighbour = SandboxSpec { tenant: "other".parse().unwrap(), ..spec(Kind::Native) };
    assert_eq!(client.run(neighbour, "mark").stdout, "ran\n", "another tenant's run");
    std::thread::sleep(Duration::from_millis(200));
    let after = [&first, &second].map(|launched| client.measure(launched.id));
    assert_eq!(before.map(|stats| cpu(&stats)), after.map(|stats| cpu(&stats)));
    assert_eq!(client.measure(newborn.id).usage.wall_us, 0);
    let output = give(&parked.channel, "mark");

    assert_eq!(client.freeze_tenant(false), Ok(Answer::Done));
    // the one that was to come comes, the one that had been given its job takes it
    let mut seen = Vec::new();
    for _ in 0..3 {
        seen.push(client.recv());
    }
    assert!(
        seen.iter().any(|message| matches!(message, FromLauncher::Ready { id, .. } if *id == newborn.id)),
        "{seen:?}"
    );
    assert!(seen.contains(&FromLauncher::Started(parked.id)), "{seen:?}");
    assert!(
        seen.iter().any(|message| matches!(message, FromLauncher::Ended { id, .. } if *id == parked.id)),
        "{seen:?}"
    );
    assert_eq!(crate::client::read(output), "ran\n");
    assert_eq!(isolation.capabilities, 0);
    for id in [first.id, second.id, newborn.id] {
        client.send(&ToLauncher::Kill(id));
        client.ended(id);
    }
    client.end();
}

fn frozen_twice() {
    let mut client = Client::start();
    let [own, other] = [Kind::Native, Kind::Native].map(|kind| client.spinning(spec(kind)));
    assert_eq!(client.ask(own.id, Order::Freeze), Ok(Answer::Done));
    assert_eq!(client.freeze_tenant(true), Ok(Answer::Done));
    // taken back while the tenant is frozen, and given again
    assert_eq!(client.ask(own.id, Order::Thaw), Ok(Answer::Done));
    let before = client.measure(own.id);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(cpu(&client.measure(own.id)), cpu(&before), "its tenant is frozen");
    assert_eq!(client.ask(own.id, Order::Freeze), Ok(Answer::Done));
    assert_eq!(client.freeze_tenant(false), Ok(Answer::Done));
    let [stands, goes] = [&own, &other].map(|launched| client.measure(launched.id));
    wait_until("the other one goes on", || cpu(&client.measure(other.id)) > cpu(&goes));
    assert_eq!(cpu(&client.measure(own.id)), cpu(&stands));
    assert_eq!(client.ask(own.id, Order::Thaw), Ok(Answer::Done));
    wait_until("it goes on", || cpu(&client.measure(own.id)) > cpu(&stands));
    for id in [own.id, other.id] {
        client.send(&ToLauncher::Kill(id));
        client.ended(id);
    }
    client.end();
}

fn frozen_without_sandboxes() {
    let mut client = Client::start();
    for _ in 0..2 {
        assert_eq!(client.freeze_tenant(true), Ok(Answer::Done));
    }
    let newborn = client.launch(spec(Kind::Native));
    client.send(&ToLauncher::Kill(newborn.id));
    let report = client.ended(newborn.id);
    assert_eq!((report.started, report.killed), (false, Some(KillCause::Requested)));
    // its name may be another's then
    client.send(&ToLauncher::ForgetTenant("acme".parse().unwrap()));
    assert_eq!(client.run(spec(Kind::Native), "mark").stdout, "ran\n");
    client.end();
}

fn ends_frozen() {
    for by_tenant in [false, true] {
        let mut client = Client::start();
        let Launched { id, .. } = client.spinning(spec(Kind::Native));
        let frozen = if by_tenant { client.freeze_tenant(true) } else { client.ask(id, Order::Freeze) };
        assert_eq!(frozen, Ok(Answer::Done));
        client.end();
    }
    let mut client = Client::start();
    let Launched { id, .. } = client.spinning(spec(Kind::Native));
    assert_eq!(client.ask(id, Order::Freeze), Ok(Answer::Done));
    client.child.kill().unwrap();
    client.must_be_swept();
}

/// It has copies of all that the launcher has open, and does not come to close them.
fn frozen_from_birth() {
    let mut client = Client::start();
    for kind in [Kind::Native, Kind::Wasm] {
        let other = SandboxSpec { tenant: "other".parse().unwrap(), ..spec(kind) };
        let (parked, isolation) = client.park(other.clone());
        assert_eq!(client.freeze_tenant(true), Ok(Answer::Done));
        let newborn = client.launch(spec(Kind::Native));
        assert_eq!(client.measure(newborn.id).usage.wall_us, 0, "it is there");
        assert_eq!(client.finish(&parked, isolation, "mark").stdout, "ran\n");
        wait_until("what is left of the other is cleared away", || client.instance.sandboxes_of("other").is_empty());
        client.send(&ToLauncher::ForgetTenant(other.tenant));
        let used = client.cpu_ticks();
        std::thread::sleep(Duration::from_millis(300));
        assert!(client.cpu_ticks() - used < 20, "the launcher works for nothing");
        assert_eq!(client.freeze_tenant(false), Ok(Answer::Done));
        client.ready(newborn.id);
        client.send(&ToLauncher::Kill(newborn.id));
        client.ended(newborn.id);
    }
    // nor does it keep the launcher's death from being seen
    assert_eq!(client.freeze_tenant(true), Ok(Answer::Done));
    let newborn = client.launch(spec(Kind::Native));
    assert_eq!(client.measure(newborn.id).usage.wall_us, 0, "it is there");
    client.child.kill().unwrap();
    client.must_be_swept();
}

fn changed_limits() {
    let mut client = Client::start();
    let long = Limits { cpu_time: Duration::from_secs(60), wall_time: Duration::from_secs(60), ..limits() };
    let other = Limits { memory_bytes: 32 << 20, cpu_millicores: 500, cpu_weight: 7, pids: 3, ..long };
    type Change = fn(&mut Limits);
    let changes: [(Change, KillCause); 3] = [
        (|limits| limits.cpu_time = Duration::from_millis(10), KillCause::CpuTime),
        (|limits| limits.wall_time = Duration::from_millis(10), KillCause::WallTime),
        (|limits| limits.memory_bytes = 4 << 20, KillCause::Memory),
    ];
    for (change, cause) in changes {
        let Launched { id, .. } = client.spinning(SandboxSpec { limits: long, ..spec(Kind::Wasm) });
        wait_until("it has run", || cpu(&client.measure(id)) > 20_000);
        assert_eq!(client.ask(id, Order::Limit(other)), Ok(Answer::Done));
        assert_eq!(client.ask(id, Order::Limit(long)), Ok(Answer::Done), "and back");
        let mut less = long;
        change(&mut less);
        if cause == KillCause::Memory && client.measure(id).memory_bytes.unwrap() < 4 << 20 {
            // there is less in it than the least that it may have
            client.send(&ToLauncher::Kill(id));
            client.ended(id);
            continue;
        }
        assert_eq!(client.ask(id, Order::Limit(less)), Ok(Answer::Ending));
        assert_eq!(client.ended(id).killed, Some(cause));
    }
    client.end();
}

fn unchangeable_limits() {
    let mut client = Client::start();
    let Launched { id, .. } = client.spinning(spec(Kind::Native));
    type Change = fn(&mut Limits);
    let changes: [(&str, Change); 10] = [
        ("memory_bytes", |limits| limits.memory_bytes = u64::MAX),
        ("cpu_cores", |limits| limits.cpu_millicores = 0),
        ("cpu_weight", |limits| limits.cpu_weight = 0),
        ("cpu_time_ms", |limits| limits.cpu_time = Duration::MAX),
        ("wall_time_ms", |limits| limits.wall_time = Duration::ZERO),
        ("pids", |limits| limits.pids = 0),
        ("scratch_bytes", |limits| limits.scratch_bytes *= 2),
        ("scratch_inodes", |limits| limits.scratch_inodes *= 2),
        ("open_files", |limits| limits.open_files *= 2),
        ("stack_bytes", |limits| limits.stack_bytes *= 2),
    ];
    for (limit, change) in changes {
        let mut changed = limits();
        change(&mut changed);
        assert_eq!(client.ask(id, Order::Limit(changed)), Err(OrderError::Limit(limit.to_owned())));
    }
    client.send(&ToLauncher::Kill(id));
    client.ended(id);
    client.end();
}

fn listed(client: &mut Client, id: SandboxId) -> Vec<ProcessInfo> {
    let request = client.order(id, Order::List);
    let mut listed = Vec::new();
    loop {
        match client.answer(request) {
            Ok(Answer::Processes { some, last }) => {
                assert!(some.len() <= PROCESSES_AT_ONCE);
                listed.extend(some);
                if last {
                    listed.sort_by_key(|process| process.pid);
                    return listed;
                }
            }
            other => panic!("{other:?}"),
        }
    }
}

fn processes() {
    const CHILDREN: usize = 40;
    let mut client = Client::start();
    let other = client.spinning(SandboxSpec { ceiling: Ceiling::default(), ..spec(Kind::Native) });
    let mut many = spec(Kind::Native);
    many.limits.pids = 64;
    let (launched, _) = client.park(many);
    drop(give(&launched.channel, "40 children wait"));
    assert_eq!(client.recv(), FromLauncher::Started(launched.id));
    let mut found = Vec::new();
    wait_until("it has its children", || {
        found = listed(&mut client, launched.id);
        found.len() == CHILDREN + 2
    });
    let pids: Vec<u32> = found.iter().map(|process| process.pid).collect();
    assert_eq!(pids[..2], [1, 2], "the init and the job");
    assert!(found.iter().all(|process| process.threads == 1 && "RS".contains(process.state)), "{found:?}");
    assert_eq!((&*found[0].command, &*found[1].command), ("holm-init", "holm-native"));
    let mut outside: Vec<i32> = found.iter().map(|process| process.host_pid.cast_signed()).collect();
    outside.extend(listed(&mut client, other.id).iter().map(|process| process.host_pid.cast_signed()));
    outside.sort_unstable();
    assert_eq!(outside, client.instance.processes());
    for id in [launched.id, other.id] {
        client.send(&ToLauncher::Kill(id));
        client.ended(id);
    }
    client.end();
}

fn nothing_there() {
    let mut client = Client::start();
    let orders = || [Order::Freeze, Order::Thaw, Order::Limit(limits()), Order::Measure, Order::List];
    for id in [SandboxId(77), SandboxId(u64::MAX)] {
        for order in orders() {
            assert_eq!(client.ask(id, order), Err(OrderError::Ended));
        }
    }
    let Launched { id, .. } = client.spinning(spec(Kind::Native));
    client.send(&ToLauncher::Kill(id));
    client.ended(id);
    for order in orders() {
        assert_eq!(client.ask(id, order), Err(OrderError::Ended));
    }
    assert_eq!(client.run(spec(Kind::Native), "mark").stdout, "ran\n");
    client.end();
}

/// Whatever comes first of both, each is answered once, and the last one holds.
fn overtaken() {
    let mut client = Client::start();
    let Launched { id, .. } = client.spinning(spec(Kind::Native));
    for _ in 0..50 {
        let requests = [Order::Freeze, Order::Freeze, Order::Thaw].map(|order| client.order(id, order));
        let mut results = requests.map(|_| None);
        for _ in requests {
            let FromLauncher::Answer { request, result } = client.recv() else { panic!("no answer") };
            let which = requests.iter().position(|asked| *asked == request).unwrap();
            assert_eq!(results[which].replace(result), None, "answered twice");
        }
        let [first, second, last] = results.map(Option::unwrap);
        for result in [first, second] {
            assert!(matches!(result, Ok(Answer::Done) | Err(OrderError::Overtaken)), "{result:?}");
        }
        assert_eq!(last, Ok(Answer::Done));
    }
    let before = cpu(&client.measure(id));
    wait_until("it goes on", || cpu(&client.measure(id)) > before);
    client.send(&ToLauncher::Kill(id));
    client.ended(id);
    client.end();
}
