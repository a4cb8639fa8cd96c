//! Jobs and tenants that are paused, resumed, limited anew and looked at while they run.

use std::fs;
use std::time::Duration;

use serde_json::Value;

use super::inspect::{Process, Running};
use super::{Answer, Server, wait_until};

impl Server {
    /// Pauses or resumes a job, or whatever else is ordered by a POST.
    pub fn order(&self, id: &str, what: &str) -> Answer {
        self.operator("POST", &format!("/v1/jobs/{id}/{what}"), &[], b"")
    }

    #[track_caller]
    pub fn pause(&self, job: &Running) -> Value {
        let record = self.order(job.id(), "pause").expect(200).json();
        assert_eq!(record["state"], "paused", "{record}");
        record
    }

    #[track_caller]
    pub fn resume(&self, job: &Running) -> Value {
        let record = self.order(job.id(), "resume").expect(200).json();
        assert_eq!(record["state"], "running", "{record}");
        record
    }

    #[track_caller]
    pub fn record(&self, id: &str) -> Value {
        self.get(&format!("/v1/jobs/{id}")).expect(200).json()
    }

    #[track_caller]
    pub fn stats(&self, job: &Running) -> Value {
        self.get(&format!("/v1/jobs/{}/stats", job.id())).expect(200).json()
    }

    pub fn limit_job(&self, job: &Running, limits: &Value) -> Answer {
        self.patch_json(&format!("/v1/jobs/{}", job.id()), &serde_json::json!({ "limits": limits }))
    }

    /// Lets a job that stands still have so much more wall time, once it goes on.
    #[track_caller]
    pub fn limit_wall_time(&self, job: &Running, more: Duration) {
        let so_far = self.stats(job)["wall_us"].as_u64().unwrap() / 1000;
        let wall_time = so_far + u64::try_from(more.as_millis()).unwrap();
        let record = self.limit_job(job, &serde_json::json!({ "wall_time_ms": wall_time })).expect(200).json();
        assert_eq!(record["state"], "paused", "{record}");
    }

    /// Pauses or resumes a tenant.
    #[track_caller]
    pub fn pause_tenant(&self, tenant: &str, paused: bool) -> Value {
        let what = if paused { "pause" } else { "resume" };
        let tenant = self.operator("POST", &format!("/v1/tenants/{tenant}/{what}"), &[], b"").expect(200).json();
        assert_eq!(tenant["paused"], paused, "{tenant}");
        tenant
    }

    /// The record of a job, once it is over.
    #[track_caller]
    pub fn over(&self, id: &str) -> Value {
        wait_until("the job is over", || {
            let record = self.record(id);
            (record["state"] == "finished").then_some(record)
        })
    }
}

impl Running {
    /// CPU time that the kernel has counted for it so far, as the host sees it.
    #[track_caller]
    pub fn cpu_time(&self, server: &Server) -> Duration {
        let file = self.any_cgroup_file(server, &["cpuacct.usage", "cpu.stat"]);
        let text = fs::read_to_string(&file).unwrap();
        match text.lines().find_map(|line| line.strip_prefix("usage_usec ")) {
            Some(us) => Duration::from_micros(us.parse().unwrap()),
            None => Duration::from_nanos(text.trim_end().parse().unwrap()),
        }
    }

    /// Fails unless the kernel counts no CPU time for it in this while.
    #[track_caller]
    pub fn assert_still(&self, server: &Server, time: Duration) {
        let before = self.cpu_time(server);
        std::thread::sleep(time);
        assert_eq!(self.cpu_time(server), before);
    }

    /// Waits until it has used this much more CPU time.
    #[track_caller]
    pub fn wait_for_cpu(&self, server: &Server, more: Duration) {
        let before = self.cpu_time(server);
        wait_until("it uses CPU time", || (self.cpu_time(server) >= before + more).then_some(()));
    }

    /// Its processes of this name.
    pub fn named(&self, server: &Server, name: &str) -> Vec<Process> {
        let is_it = |process: &Process| process.try_status().is_some_and(|status| status["Name"] == name);
        self.processes(server).into_iter().filter(is_it).collect()
    }
}
