{{/* Pieces of NetworkPolicies. `peers` and `ports` stand under `to` or `from`, and empty ones leave all open. */}}

{{- define "trunkline.release" -}}
matchLabels:
  app.kubernetes.io/name: {{ .Chart.Name }}
  app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* Pods of a component: {root, component}. */}}
{{- define "trunkline.pods" -}}
matchLabels: {{- include "trunkline.selector" . | nindent 2 }}
{{- end -}}

{{/* Workers, in every namespace that the operator looks after. */}}
{{- define "trunkline.workers" -}}
- podSelector: {matchExpressions: [{key: trunkline.dev/agent, operator: Exists}]}
  {{- if .Values.watchNamespaces }}
  namespaceSelector:
    matchExpressions:
      - {key: kubernetes.io/metadata.name, operator: In, values: {{ toJson .Values.watchNamespaces }}}
  {{- else }}
  namespaceSelector: {}
  {{- end }}
{{- end -}}

{{/* `{direction: peers, ports}` without what is empty: {direction, peers, ports, protocols}. */}}
{{- define "trunkline.rule" -}}
{{- $rule := dict }}
{{- with .peers }}{{ $_ := set $rule $.direction . }}{{ end }}
{{- $ports := list }}
{{- range $port := .ports }}
{{- range $protocol := $.protocols | default (list "TCP") }}
{{- $ports = append $ports (dict "port" $port "protocol" $protocol) }}
{{- end }}
{{- end }}
{{- with $ports }}{{ $_ := set $rule "ports" . }}{{ end }}
{{- list $rule | toYaml }}
{{- end -}}

{{- define "trunkline.toDNS" -}}
{{- with .Values.networkPolicy.dns }}
{{- include "trunkline.rule" (dict "direction" "to" "peers" .peers "ports" .ports "protocols" (list "UDP" "TCP")) }}
{{- end }}
{{- end -}}

{{- define "trunkline.toAPIServer" -}}
{{- with .Values.networkPolicy.apiServer }}
{{- include "trunkline.rule" (dict "direction" "to" "peers" .peers "ports" .ports) }}
{{- end }}
{{- end -}}

{{- define "trunkline.toModal" -}}
{{- with .Values.networkPolicy.modal }}
{{- include "trunkline.rule" (dict "direction" "to" "peers" .peers "ports" .ports) }}
{{- end }}
{{- end -}}

{{/* Nothing where nobody reads metrics. Kubelets' probes need no rule. */}}
{{- define "trunkline.fromScrapers" -}}
{{- $peers := .Values.networkPolicy.scrapers }}
{{- if and (not $peers) .Values.monitoring.podMonitors.enabled }}
{{- $peers = list (dict "namespaceSelector" (dict)) }}
{{- end }}
{{- if $peers }}
{{- include "trunkline.rule" (dict "direction" "from" "peers" $peers "ports" (list 9090)) }}
{{- end }}
{{- end -}}
