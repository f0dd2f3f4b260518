"""A reward service with grpcio and the contract, and nothing else: copy it to begin one of your own.

Generate the contract's code beside it, then run it:

    pip install grpcio grpcio-tools
    python -m grpc_tools.protoc -I protos --python_out=. --grpc_python_out=. \\
        protos/tandem/engine/v1/engine.proto protos/tandem/inference/v1/inference.proto \\
        protos/tandem/reward/v1/reward.proto
    python reward.py unix:/tmp/tandem/reward.sock

A rollout earns 1 if the last number in it is what its row's column `answer` says, and 0 if not. Rows without that
column are none of this service's business.
"""

import re
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc

from tandem.reward.v1 import reward_pb2, reward_pb2_grpc


class RewardService(reward_pb2_grpc.RewardServiceServicer):
    def Score(self, request, context):
        return reward_pb2.ScoreResponse(rewards=[score(rollout) for rollout in request.rollouts])


def score(rollout):
    if "answer" not in rollout.columns:
        return reward_pb2.Reward()
    numbers = re.findall(r"-?\d+", text(rollout.completion))
    return reward_pb2.Reward(value=bool(numbers) and numbers[-1] == rollout.columns["answer"])


def text(turn):
    if turn.WhichOneof("form") == "text":
        return turn.text
    return "".join(message.content for message in turn.chat.messages)


def main(address):
    server = grpc.server(
        ThreadPoolExecutor(8),
        options=[("grpc.max_receive_message_length", 16 * 2**20)],  # 4 MiB by default
    )
    reward_pb2_grpc.add_RewardServiceServicer_to_server(RewardService(), server)
    server.add_insecure_port(address)
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main(sys.argv[1])
