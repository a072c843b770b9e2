// The worker's side of ../stamps.py, and the line protocol of ../driver.py.
const fs = require('fs');
const readline = require('readline');

const RECORD = 32;
const HEAD = RECORD * 8;

function words(...values) {
  const buffer = Buffer.alloc(8 * values.length);
  values.forEach((value, at) => buffer.writeBigUInt64LE(BigInt(value), 8 * at));
  return buffer;
}

class Stamps {
  constructor(path, worker) {
    this.fd = fs.openSync(path, 'r+');
    this.jobs = (fs.fstatSync(this.fd).size - HEAD) / 8;
    this.at = RECORD * worker;
    this.runs = 0;
    this.began = 0n;
    this.first = 0n;
    // Fifty times a second: a write for each job would cost more than the job.
    setInterval(() => this.publish(), 20);
    process.on('SIGTERM', () => { this.publish(); process.exit(0); });
  }

  begin() { this.began = process.hrtime.bigint(); this.publish(); }

  hit(number) {
    const now = process.hrtime.bigint();
    if (this.runs === 0) this.first = now;
    this.runs += 1;
    if (number < this.jobs) fs.writeSync(this.fd, words(now), 0, 8, HEAD + 8 * number);
  }

  publish() { fs.writeSync(this.fd, words(this.runs, this.began, this.first), 0, 24, this.at); }
}

async function serve(bulk, one) {
  console.log('ready');
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const [what, first, count] = line.split(' ');
    const before = process.hrtime.bigint();
    await (what === 'bulk' ? bulk(+first, +count) : one(+first));
    console.log(`${before} ${process.hrtime.bigint()}`);
  }
}

module.exports = { Stamps, serve };
