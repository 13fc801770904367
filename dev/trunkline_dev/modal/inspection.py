"""The calls that the `modal` command line makes to show and stop what runs."""

from collections.abc import Callable
from typing import Final

from grpclib import GRPCError, Status
from modal_proto import api_pb2

from trunkline_dev.modal.rpc import Message
from trunkline_dev.modal.state import AppRecord, Boot, State

RECENT: Final = 100  # apps in a list, the newest; Modal, too, shows stopped ones only for a while


class Inspection:
    """One method per call; the names are Modal's. `stop_container(name)` tells one to go."""

    def __init__(self, state: State, stop_container: Callable[[str], None]) -> None:
        self._state, self._stop_container = state, stop_container

    def TokenInfoGet(self, _: Message) -> Message:
        return api_pb2.TokenInfoGetResponse(
            token_id="ak-local", workspace_id="ws-local", workspace_name="local"
        )

    def EnvironmentList(self, _: Message) -> Message:
        names = {"main", *(app.environment for app in self._state.apps.values())}
        items = [
            api_pb2.EnvironmentListItem(
                name=name, environment_id=f"en-{name}", default=name == "main"
            )
            for name in sorted(names)
        ]
        return api_pb2.EnvironmentListResponse(items=items)

    def AppList(self, request: Message) -> Message:
        response = api_pb2.AppListResponse()
        for app in self._apps(request.environment_name)[-RECENT:]:
            response.apps.add(
                app_id=app.app_id,
                name=app.name,
                description=app.name,
                state=app.state,
                created_at=app.created_at,
                stopped_at=app.stopped_at,
                n_running_tasks=len(self._running(app)),
            )
        return response

    def AppGetLifecycle(self, request: Message) -> Message:
        return api_pb2.AppGetLifecycleResponse(lifecycle=self._app(request.app_id).lifecycle())

    def AppDeploymentHistory(self, request: Message) -> Message:
        app = self._app(request.app_id)
        response = api_pb2.AppDeploymentHistoryResponse(production_app_version=app.version)
        for deployment in reversed(app.history):
            response.app_deployment_histories.add(
                app_id=app.app_id,
                version=deployment.version,
                deployed_at=deployment.t,
                deployed_by="local",
                client_version=deployment.client_version,
                tag=deployment.tag,
            )
        return response

    def TaskList(self, request: Message) -> Message:
        if request.app_id:
            apps = [self._app(request.app_id)]
        else:
            apps = self._apps(request.environment_name)
        response = api_pb2.TaskListResponse()
        for app in apps:
            for boot in self._running(app):
                response.tasks.add(
                    task_id=boot.container,
                    app_id=app.app_id,
                    app_description=app.name,
                    enqueued_at=boot.t,
                    started_at=boot.ready_t or 0.0,
                )
        return response

    def TaskGetInfo(self, request: Message) -> Message:
        boot = self._boot(request.task_id)
        info = api_pb2.TaskInfo(
            id=boot.container,
            enqueued_at=boot.t,
            started_at=boot.ready_t or 0.0,
            finished_at=boot.end_t or 0.0,
            gpu_type=boot.gpu,
        )
        return api_pb2.TaskGetInfoResponse(app_id=boot.app_id, info=info)

    def ContainerStop(self, request: Message) -> Message:
        self._boot(request.task_id)
        self._stop_container(request.task_id)
        return api_pb2.ContainerStopResponse()

    def ServerGetTimeRangeStats(self, request: Message) -> Message:
        """Containers alone: what passes through a session is not counted here."""
        since, until = request.since.ToNanoseconds() / 1e9, request.until.ToNanoseconds() / 1e9
        boots = [
            boot
            for boot in self._state.boots
            if boot.function_id == request.function_id
            and (not request.container_id or request.container_id == boot.container)
        ]
        failed = [boot for boot in boots if boot.failed and since <= (boot.end_t or 0.0) < until]
        return api_pb2.ServerGetTimeRangeStatsResponse(
            since=request.since,
            until=request.until,
            container_started_count=sum(since <= (boot.ready_t or 0.0) < until for boot in boots),
            container_error_count=len(failed),
            container_creating_at_end_count=sum(
                boot.ready_t is None and boot.end_t is None for boot in boots
            ),
            container_total_count=sum(
                boot.t < until and (boot.end_t is None or boot.end_t >= since) for boot in boots
            ),
        )

    def _apps(self, environment: str) -> list[AppRecord]:
        environment = environment or "main"
        return [app for app in self._state.apps.values() if app.environment == environment]

    def _app(self, app_id: str) -> AppRecord:
        if app := self._state.apps.get(app_id):
            return app
        raise GRPCError(Status.NOT_FOUND, f"App '{app_id}' not found")

    def _running(self, app: AppRecord) -> list[Boot]:
        return [
            boot for boot in self._state.boots if boot.app_id == app.app_id and boot.end_t is None
        ]

    def _boot(self, container: str) -> Boot:
        for boot in self._state.boots:
            if boot.container == container:
                return boot
        raise GRPCError(Status.NOT_FOUND, f"Container '{container}' not found")
