// A reward service in JavaScript, of the contract's own files: nothing is generated.
//
//     npm install
//     node reward.js unix:///tmp/tandem/reward.sock
//
// A rollout earns 1 if the last number in it is what its row's column `answer` says, and 0 if not. Rows without that
// column are none of this service's business.

import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const protos = process.env.TANDEM_PROTOS ?? fileURLToPath(new URL("../../protos", import.meta.url));
const definition = loader.loadSync("tandem/reward/v1/reward.proto", { includeDirs: [protos], oneofs: true });
const { RewardService } = grpc.loadPackageDefinition(definition).tandem.reward.v1;

const text = (turn) =>
  turn.form === "text" ? turn.text : turn.chat.messages.map((message) => message.content).join("");

function reward(rollout) {
  const answer = rollout.columns?.fields.answer?.stringValue;
  if (answer === undefined) return {};
  const numbers = text(rollout.completion).match(/-?\d+/g) ?? [];
  return { value: numbers.at(-1) === answer ? 1 : 0 };
}

const server = new grpc.Server({ "grpc.max_receive_message_length": 16 * 2 ** 20 }); // 4 MiB by default
server.addService(RewardService.service, {
  score: ({ request }, done) => done(null, { rewards: (request.rollouts ?? []).map(reward) }),
});

const [address] = process.argv.slice(2);
server.bindAsync(address, grpc.ServerCredentials.createInsecure(), (error) => {
  if (error) throw error;
  console.log(`serving rewards at ${address}`);
});
process.once("SIGTERM", () => server.tryShutdown(() => process.exit(0)));
