"""Print a secret that AWS keeps (Systems Manager, parameter store), for the environment of what is started next.

export MLFLOW_TRACKING_PASSWORD="$(python infra/aws_parameter.py /cae/mlflow)"
"""

import sys

import boto3

print(boto3.client("ssm").get_parameter(Name=sys.argv[1], WithDecryption=True)["Parameter"]["Value"])
