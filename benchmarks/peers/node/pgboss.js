// pg-boss: batches of 5,000, polls of half a second (its shortest).
const PgBoss = require('pg-boss');
const { Stamps, serve } = require('./stamps.js');

const [role, file, worker] = process.argv.slice(2);
const connectionString = process.env.BENCH_TCP_DSN;
const CHUNK = 1000;

async function install() {
  const boss = new PgBoss({ connectionString, supervise: false, schedule: false });
  await boss.start();
  await boss.createQueue('noop');
}

async function client() {
  const boss = new PgBoss({ connectionString, max: 10, supervise: false, schedule: false });
  await boss.start();
  await serve(
    async (first, count) => {
      for (let at = 0; at < count; at += CHUNK) {
        const size = Math.min(CHUNK, count - at);
        await boss.insert(Array.from({ length: size }, (_, n) => ({ name: 'noop', data: { number: first + at + n } })));
      }
    },
    (number) => boss.send('noop', { number }),
  );
}

async function work() {
  const stamps = new Stamps(file, +worker);
  const boss = new PgBoss({ connectionString, max: 10, supervise: true });
  boss.on('error', console.error);
  stamps.begin();
  await boss.start();
  await boss.work('noop', { batchSize: 5000, pollingIntervalSeconds: 0.5 }, async (jobs) => {
    for (const job of jobs) stamps.hit(job.data.number);
  });
}

if (role === 'install') install().then(() => process.exit(0));
else if (role === 'client') client().then(() => process.exit(0));
else work();
