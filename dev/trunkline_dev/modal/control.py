"""The calls that the SDK makes: enough to deploy, find, adjust and stop servers.

Images are not built and not run: a container is a process of this machine's own Python, with the files
that the SDK uploaded first on its path. What an app asks for is kept as it was sent.
"""

import hashlib
import json
import re
import secrets
import sys
import time
from collections.abc import Callable
from typing import Final, Protocol

import jwt
from grpclib import GRPCError, Status
from modal_proto import api_pb2

from trunkline_dev.modal.faults import Fault, Rule
from trunkline_dev.modal.rpc import Message
from trunkline_dev.modal.state import (
    AppRecord,
    Deployment,
    Gpu,
    ServerRecord,
    State,
    digest,
    new_id,
    now,
)

IMAGE_BUILDER: Final = "2025.06"
TOKEN_SECONDS: Final = 1200
GPUS: Final = re.compile(
    r"ANY|T4|L4|A10G?|L40S|A100(-[48]0GB)?|RTX-PRO-6000|H100!?|H200|B200\+?|B300"
)
DONE: Final = api_pb2.GenericResult(status=api_pb2.GenericResult.GENERIC_STATUS_SUCCESS)


class Servers(Protocol):
    """What the control plane asks of the part that runs containers."""

    async def url(self, app: AppRecord, record: ServerRecord) -> str:
        """Where the server listens, or will."""

    def deploy(self, app: AppRecord, record: ServerRecord) -> None: ...

    def stop(self, function_id: str) -> None: ...

    def settings_changed(self, function_id: str) -> None: ...

    def ready_containers(self, function_id: str) -> list[tuple[str, str, int]]:
        """Name, address and port of each."""


class Tokens:
    """Signs and checks the short-lived tokens that the SDK shows to servers."""

    def __init__(self) -> None:
        self._key = secrets.token_hex(32)

    def issue(self) -> str:
        return jwt.encode({"exp": time.time() + TOKEN_SECONDS}, self._key, algorithm="HS256")

    def valid(self, token: str) -> bool:
        try:
            jwt.decode(token, self._key, algorithms=["HS256"])
        except jwt.InvalidTokenError:
            return False
        return True


def not_found(what: str) -> GRPCError:
    return GRPCError(Status.NOT_FOUND, f"{what} not found")


class Control:
    """One method per call; the names are Modal's."""

    def __init__(
        self, state: State, servers: Servers, tokens: Tokens, local_url: Callable[[], str]
    ) -> None:
        self._state, self._servers, self._tokens, self._local_url = (
            state,
            servers,
            tokens,
            local_url,
        )

    def _app(self, app_id: str) -> AppRecord:
        if app := self._state.apps.get(app_id):
            return app
        raise not_found(f"App '{app_id}'")

    def _server(self, function_id: str) -> ServerRecord:
        if record := self._state.servers.get(function_id):
            return record
        raise not_found(f"Function '{function_id}'")

    # --- the connection ---------------------------------------------------------------------------

    def ClientHello(self, _: Message) -> Message:
        return api_pb2.ClientHelloResponse()

    def AuthTokenGet(self, _: Message) -> Message:
        return api_pb2.AuthTokenGetResponse(token=self._tokens.issue())

    def EnvironmentGetOrCreate(self, request: Message) -> Message:
        name = request.deployment_name or "main"
        if self._state.environments is not None and name not in self._state.environments:
            raise not_found(f"Environment '{name}'")
        settings = api_pb2.EnvironmentSettings(image_builder_version=IMAGE_BUILDER)
        return api_pb2.EnvironmentGetOrCreateResponse(
            environment_id=f"en-{name}",
            metadata=api_pb2.EnvironmentMetadata(name=name, settings=settings),
        )

    def WorkspaceNameLookup(self, _: Message) -> Message:
        return api_pb2.WorkspaceNameLookupResponse(workspace_name="local", username="local")

    def WebhookTokenCreate(self, _: Message) -> Message:
        token, secret = new_id("wk"), new_id("ws")
        self._state.proxy_tokens[token] = secret
        return api_pb2.TokenCreateResponse(token_id=token, token_secret=secret)

    def WebhookTokenDelete(self, request: Message) -> None:
        self._state.proxy_tokens.pop(request.token_id, None)

    # --- apps -------------------------------------------------------------------------------------

    def AppGetByDeploymentName(self, request: Message) -> Message:
        environment = request.environment_name or "main"
        app = self._state.app_named(environment, request.name)
        before = None if app else self._state.stopped_app(environment, request.name)
        found = app or before
        return api_pb2.AppGetByDeploymentNameResponse(
            app_id=app.app_id if app else "",
            previous_app_id=before.app_id if before else "",
            environment_name=environment,
            lifecycle=found.lifecycle() if found else None,
        )

    def AppGetOrCreate(self, request: Message) -> Message:
        environment = request.environment_name or "main"
        named = self._state.app_named(environment, request.app_name)
        app = named or self._state.apps.get(request.app_name)
        if app is None:
            raise not_found(f"App '{request.app_name}' in environment '{environment}'")
        return api_pb2.AppGetOrCreateResponse(app_id=app.app_id)

    def AppCreate(self, request: Message) -> Message:
        app = AppRecord(
            app_id=new_id("ap"),
            name=request.description,
            environment=request.environment_name or "main",
            tags=dict(request.tags),
        )
        self._state.apps[app.app_id] = app
        return api_pb2.AppCreateResponse(app_id=app.app_id, app_page_url=self._page())

    def _page(self) -> str:
        return f"{self._local_url()}/_local/apps"

    def AppHeartbeat(self, request: Message) -> None:
        self._app(request.app_id)

    def AppClientDisconnect(self, request: Message) -> None:
        app = self._app(request.app_id)
        if app.state == api_pb2.APP_STATE_INITIALIZING:
            app.state = api_pb2.APP_STATE_STOPPED

    def AppGetLayout(self, request: Message) -> Message:
        layout = self._state.layout(self._app(request.app_id))
        return api_pb2.AppGetLayoutResponse(app_layout=layout)

    def AppGetTags(self, request: Message) -> Message:
        return api_pb2.AppGetTagsResponse(tags=self._app(request.app_id).tags)

    def AppSetTags(self, request: Message) -> None:
        self._app(request.app_id).tags = dict(request.tags)

    def AppPublish(self, request: Message) -> Message:
        """Makes what was created live. The same definitions again are no deployment at all."""
        app = self._app(request.app_id)
        app.tags.update(request.tags)
        content = [sorted(request.function_ids.items()), sorted(request.definition_ids.items())]
        fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        if app.deployed and app.fingerprint == fingerprint:
            return api_pb2.AppPublishResponse(url=self._page(), deployed_at=0.0)
        for gone in set(app.functions.values()) - set(request.function_ids.values()):
            self._servers.stop(gone)
        app.functions = dict(request.function_ids)
        app.state, app.fingerprint = request.app_state, fingerprint
        app.version, app.deployed_at = app.version + 1, now()
        app.history.append(
            Deployment(
                version=app.version,
                t=app.deployed_at,
                tag=request.deployment_tag,
                client_version=request.client_version,
            )
        )
        for function_id in app.functions.values():
            record = self._server(function_id)
            record.overrides = api_pb2.AutoscalerSettings()  # a deployment resets them
            self._servers.deploy(app, record)
        return api_pb2.AppPublishResponse(url=self._page(), deployed_at=app.deployed_at)

    def AppStop(self, request: Message) -> None:
        app = self._app(request.app_id)
        app.state, app.stopped_at = api_pb2.APP_STATE_STOPPED, now()
        for function_id in app.functions.values():
            self._servers.stop(function_id)

    # --- images, files, secrets -------------------------------------------------------------------

    def ImageGetOrCreate(self, request: Message) -> Message:
        version = "{}.{}.{}".format(*sys.version_info[:3])
        commands = " ".join(request.image.dockerfile_commands)
        strike = self._state.faults.strike(Fault.IMAGE_BUILD_FAILS, commands, now())
        return api_pb2.ImageGetOrCreateResponse(
            image_id=self._state.named("im", digest(request.image), request.builder_version),
            result=build_failure(strike.rule) if strike else DONE,
            metadata=api_pb2.ImageMetadata(
                image_builder_version=request.builder_version, python_version_info=version
            ),
        )

    def MountBatchedCheckExistence(self, request: Message) -> Message:
        missing = [name for name in request.sha256_hex_hashes if name not in self._state.files]
        return api_pb2.MountBatchedCheckExistenceResponse(missing_sha256_hex_hashes=missing)

    def MountPutFile(self, request: Message) -> Message:
        if request.WhichOneof("data_oneof") == "data":
            self._state.files[request.sha256_hex] = request.data
        return api_pb2.MountPutFileResponse(exists=request.sha256_hex in self._state.files)

    def MountGetOrCreate(self, request: Message) -> Message:
        files = sorted(f"{file.filename} {file.sha256_hex}" for file in request.files)
        mount_id = self._state.named("mo", request.deployment_name, *files)
        self._state.mounts[mount_id] = list(request.files)
        checksum = hashlib.sha256("\n".join(files).encode()).hexdigest()
        return api_pb2.MountGetOrCreateResponse(
            mount_id=mount_id,
            handle_metadata=api_pb2.MountHandleMetadata(content_checksum_sha256_hex=checksum),
        )

    def SecretGetOrCreate(self, request: Message) -> Message:
        """An app's own secret is known by its content, so that deploying it again changes nothing."""
        name = request.deployment_name
        if name:
            key = request.environment_name or "main", name
            exists = ("st", *key) in self._state.names
            if not exists and not request.object_creation_type:
                raise not_found(f"Secret '{name}'")
        else:
            key = request.app_id, digest(request)
        secret_id = self._state.named("st", *key)
        if request.env_dict or secret_id not in self._state.secrets:
            self._state.secrets[secret_id] = dict(request.env_dict)
        keys = sorted(self._state.secrets[secret_id])
        return api_pb2.SecretGetOrCreateResponse(
            secret_id=secret_id, metadata=api_pb2.SecretMetadata(name=name, keys=keys)
        )

    # --- servers ----------------------------------------------------------------------------------

    async def FunctionPrecreate(self, request: Message) -> Message:
        app = self._app(request.app_id)
        function_id = request.existing_function_id or new_id("fu")
        record = self._state.servers.setdefault(
            function_id,
            ServerRecord(function_id=function_id, app_id=app.app_id, name=request.function_name),
        )
        metadata = record.metadata()
        metadata.function_type = request.function_type
        metadata.function_schema.CopyFrom(request.function_schema)
        return api_pb2.FunctionPrecreateResponse(function_id=function_id, handle_metadata=metadata)

    async def FunctionCreate(self, request: Message) -> Message:
        ranked = [one.function for one in request.function_data.ranked_functions]  # gpu=[…]
        ranked = ranked or [request.function]
        for choice in ranked:
            refuse_unsupported(choice)
        definition = ranked[0]
        record = self._server(request.existing_function_id)
        record.definition = definition
        record.gpus = tuple(Gpu.of(choice) for choice in ranked)
        record.definition_id = "de-" + digest(*map(_canonical, ranked))[:22]
        record.url = await self._servers.url(self._app(record.app_id), record)
        return api_pb2.FunctionCreateResponse(
            function_id=record.function_id,
            function=definition,
            function_data=record.data(),
            handle_metadata=record.metadata(),
        )

    def FunctionGet(self, request: Message) -> Message:
        environment = request.environment_name or "main"
        app = self._state.app_named(environment, request.app_name)
        if app is None or request.object_tag not in app.functions:
            name = f"{request.app_name}/{request.object_tag}"
            raise not_found(f"Server '{name}' in environment '{environment}'")
        record = self._server(app.functions[request.object_tag])
        return api_pb2.FunctionGetResponse(
            function_id=record.function_id,
            handle_metadata=record.metadata(),
            function=record.data(),
        )

    def FunctionGetById(self, request: Message) -> Message:
        record = self._server(request.function_id)
        return api_pb2.FunctionGetByIdResponse(
            function=record.data(), handle_metadata=record.metadata()
        )

    def FunctionUpdateSchedulingParams(self, request: Message) -> Message:
        record = self._server(request.function_id)
        record.overrides.MergeFrom(request.settings)
        self._servers.settings_changed(request.function_id)
        return api_pb2.FunctionUpdateSchedulingParamsResponse(current_settings=record.settings())

    def FunctionGetSchedulingParams(self, request: Message) -> Message:
        record = self._server(request.function_id)
        return api_pb2.FunctionGetSchedulingParamsResponse(
            autoscaler_configuration=api_pb2.AutoscalerConfiguration(
                settings=record.settings(),
                static_settings=record.definition.autoscaler_settings,
                override_settings=record.overrides,
            )
        )

    def FunctionGetFlashAuthToken(self, _: Message) -> Message:
        return api_pb2.FunctionGetFlashAuthTokenResponse(token=self._tokens.issue())

    def FlashContainerList(self, request: Message) -> Message:
        response = api_pb2.FlashContainerListResponse()
        for name, host, port in self._servers.ready_containers(request.function_id):
            response.containers.add(task_id=name, host=host, port=port)
        return response


def build_failure(rule: Rule) -> Message:
    return api_pb2.GenericResult(
        status=api_pb2.GenericResult.GENERIC_STATUS_FAILURE,
        exception=rule.message or "a fault of the local Modal",
    )


def refuse_unsupported(definition: Message) -> None:
    """Raises what Modal raises for an unknown GPU, and says what is not built here."""
    gpu = definition.resources.gpu_config.gpu_type
    if gpu and not GPUS.fullmatch(gpu):
        raise GRPCError(Status.INVALID_ARGUMENT, f"Unknown GPU type {gpu}")
    if not definition.is_server or not definition.is_sessioned:
        message = "the local Modal runs servers with sessions alone: app.server and modal.sessioned"
        raise GRPCError(Status.INVALID_ARGUMENT, message)
    if definition.autoscaler_settings.scaleup_window:
        raise GRPCError(Status.INVALID_ARGUMENT, "the local Modal has no scaleup_window")


def _canonical(definition: Message) -> Message:
    """Equal for equal servers: the SDK fills these lists from sets, in any order."""
    canonical = api_pb2.Function()
    canonical.CopyFrom(definition)
    for name in "mount_ids", "secret_ids":
        values = sorted(getattr(definition, name))
        canonical.ClearField(name)
        getattr(canonical, name).extend(values)
    return canonical
