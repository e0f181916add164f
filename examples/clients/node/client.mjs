// Runs a command in a container, twice: with functions.run and with functions.execute.
//
//     node client.mjs IMAGE [ARGUMENT ...]
//
// NATS_URL names the server, nats://localhost:4222 by default.
// Needs @nats-io/transport-node: npm ci

import { randomUUID } from "node:crypto";
import { setTimeout as sleep } from "node:timers/promises";
import { connect, errors } from "@nats-io/transport-node";

/** One of the outcome's streams; bytes that are not UTF-8 come in base64. */
function bytesOf(outcome, stream) {
  return Buffer.from(outcome[stream], outcome[`${stream}_encoding`]);
}

/** Asks for a run and waits for its outcome; comes back later while all slots are taken. */
async function run(nc, request, patience = 60_000) {
  const deadline = Date.now() + patience;
  for (let delay = 100; ; delay = Math.min(2 * delay, 2_000)) {
    const left = deadline - Date.now();
    const reply = await nc.request("functions.run", JSON.stringify(request), { timeout: left });
    const outcome = reply.json();
    if (outcome.error?.code !== "busy" || left < delay) return outcome;
    await sleep(delay);
  }
}

/**
 * Hands in a request and waits for the message about it on functions.results.
 *
 * A service would keep one subscription open for all its jobs and tell them apart by Job-Id.
 */
async function execute(nc, request, patience = 60_000) {
  const id = randomUUID();
  // First listen, then ask: NATS keeps nothing for those who come late.
  const results = nc.subscribe("functions.results");
  await nc.flush();
  const tooLate = setTimeout(() => results.unsubscribe(), patience);
  try {
    const body = JSON.stringify({ ...request, id });
    const reply = (await nc.request("functions.execute", body, { timeout: patience })).json();
    // Where a stream keeps the requests, the reply is the server's: it has this one, or why not. Where none does, the
    // reply is the outcome, which has a status.
    if (reply.error && !reply.status) throw new Error(`not accepted: ${reply.error.description}`);
    for await (const message of results) {
      if (message.headers?.get("Job-Id") === id) return message;
    }
    throw new Error(`no result for ${id} within ${patience} ms`);
  } finally {
    clearTimeout(tooLate);
    results.unsubscribe();
  }
}

const [image_reference, ...parameter] = process.argv.slice(2);
if (!image_reference) {
  console.error("usage: node client.mjs IMAGE [ARGUMENT ...]");
  process.exit(2);
}
const request = { image_reference, parameter };
const nc = await connect({ servers: process.env.NATS_URL ?? "nats://localhost:4222" });
try {
  const outcome = await run(nc, request);
  console.log("run:", outcome.status, outcome.exit_code ?? "-");
  process.stdout.write(bytesOf(outcome, "stdout"));
  process.stderr.write(bytesOf(outcome, "stderr"));
  if (outcome.error) console.error(outcome.error.code, outcome.error.message);

  const message = await execute(nc, request);
  // A header that is absent reads as the empty string.
  console.log("execute:", message.headers.get("Job-Status"), message.headers.get("Job-Exit-Code") || "-");
  process.stdout.write(message.data);
  process.exitCode = outcome.exit_code ?? 1;
} catch (error) {
  if (!(error instanceof errors.RequestError && error.isNoResponders())) throw error;
  console.error("nobody listens on functions.run: is worker-spawner running?");
  process.exitCode = 1;
} finally {
  await nc.close();
}
