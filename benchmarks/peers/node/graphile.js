// Graphile Worker: 24 jobs at a time, a local queue of 500, completions in batches without delay.
const { run, runMigrations, Logger } = require('graphile-worker');
const { Stamps } = require('./stamps.js');

const [role, file, worker] = process.argv.slice(2);
const connectionString = process.env.BENCH_TCP_DSN;

async function work() {
  const stamps = new Stamps(file, +worker);
  stamps.begin();
  await run({
    preset: {
      worker: {
        connectionString,
        concurrentJobs: 24,
        maxPoolSize: 10,
        pollInterval: 2000,
        localQueue: { size: 500, ttl: 300000 },
        completeJobBatchDelay: 0,
        failJobBatchDelay: 0,
      },
    },
    noHandleSignals: true,
    logger: new Logger(() => () => {}),
    taskList: { noop: async (payload) => { stamps.hit(payload.number); } },
  });
}

if (role === 'install') runMigrations({ connectionString }).then(() => process.exit(0));
else work();
